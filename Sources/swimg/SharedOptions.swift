import ArgumentParser
import DiskImage
import ImageConvert
import ImageDrivers
import ImageFormats
import ImageStorage

// Options that verbs share. Each group of options costs time at every start
// (decisions/2026-11-29-start.md), so a single option stands in each verb, with a common help.

extension ArgumentHelp {
    static let object = ArgumentHelp(
        "A secret for encrypted images: secret,id=name,file=path or secret,id=name,data=text, "
            + "with format=base64 if it is encoded.", valueName: "object")
    static let imageOpts: ArgumentHelp =
        "Images are described by options (driver=qcow2,file.filename=…)."
    static let snapshot = ArgumentHelp(
        "The image as it was when an internal snapshot was taken: its id or name, or "
            + "snapshot.id=…,snapshot.name=….", valueName: "snapshot")
    static let algorithm = ArgumentHelp(
        "The digest's algorithm: \(DigestAlgorithm.names) (default: blkhash).", valueName: "name")
}

/// Options for naming images: by path, NBD name or image options.
struct ImageNameOptions: ParsableArguments {
    @Flag(name: .customLong("image-opts"), help: .imageOpts)
    var areOptions = false

    @Option(name: .customLong("object"), parsing: .unconditionalSingleValue, help: .object)
    var objects: [OptionText] = []

    /// - Parameter format: the `-f` value, if any; invalid with image options, which name the
    ///   format themselves.
    func name(_ name: ImageName, format: String?) throws(ImageError) -> ImageName {
        try ImageName.option(name, isOptions: areOptions, format: format)
    }
}

/// Options for naming and opening the images that a verb reads.
struct SourceOptions: ParsableArguments {
    @Flag(
        name: [.customShort("U"), .customLong("force-share")],
        help: "Read images that another process writes to.")
    var forceShare = false

    @Flag(name: .customLong("image-opts"), help: .imageOpts)
    var areOptions = false

    @Option(name: .customLong("object"), parsing: .unconditionalSingleValue, help: .object)
    var objects: [OptionText] = []

    @OptionGroup var servers: ServerOptions

    /// - Parameter format: see `ImageNameOptions.name`.
    func name(_ name: ImageName, format: String?) throws(ImageError) -> ImageName {
        try ImageName.option(name, isOptions: areOptions, format: format)
    }

    func access(cacheMode: CacheMode = .writeback) throws(ImageError) -> StorageAccess {
        StorageAccess(cacheMode: cacheMode, shareForced: forceShare, options: try storageOptions())
    }

    func storageOptions() throws(ImageError) -> StorageOptions {
        var options = try servers.options()
        options.secrets = try objects.secrets()
        return options
    }
}
