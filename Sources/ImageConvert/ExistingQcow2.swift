import DiskImage
import ImageFormats
import ImageStorage

/// An existing qcow2 image that a conversion writes into (`-n`).
///
/// Everything up to the end of the source is written anew and the rest is to stay, so the image is
/// rebuilt with the properties of the old one: exact tables, no leftovers, and as with every target the old
/// image stands until the new one is whole. What a rebuilt image would lose is refused.
struct ExistingQcow2 {
    let options: Qcow2Options
    private let image: OpenedImage

    /// - Parameter path: of the target.
    static func open(_ path: String, _ opener: ImageOpener) async throws -> ExistingQcow2 {
        var opener = opener
        // The target's own lock is taken when it is opened for writing.
        opener.shareForced = true
        let image = try await opener.open(path, format: .qcow2)
        guard let header = (image.topLayer as? Qcow2Source)?.header else {
            throw ImageError.unsupported(path, "is not a qcow2 image")
        }
        if let reason = header.reasonNotToRebuild {
            throw ImageError.unsupported(
                path, "cannot write into an image with \(reason) (-n)")
        }
        var options = Qcow2Options()
        options.version = header.version
        options.clusterSize = header.geometry.clusterSize
        options.compression = header.compression
        if let file = header.backingFile {
            options.backing = Qcow2Options.Backing(
                file: file, format: header.backingFormat,
                virtualSize: image.backing?.virtualSize ?? 0)
        }
        return ExistingQcow2(options: options, image: image)
    }

    /// - Returns: the new content, and behind it what the image has there.
    func content(_ source: ConcatenatedSource, path: String) throws -> ConcatenatedSource {
        let size = image.source.virtualSize
        guard size >= source.virtualSize else {
            throw ImageError(
                .invalid, path: path,
                "is smaller (\(size) bytes) than the source (\(source.virtualSize) bytes)")
        }
        guard size > source.virtualSize else { return source }
        return try ConcatenatedSource([
            source, TailSource(image.source, from: source.virtualSize),
        ])
    }

    /// Whether the old image is needed while the new one is written, so that they cannot share a place.
    func isNeeded(with source: ConcatenatedSource) -> Bool {
        image.source.virtualSize > source.virtualSize
    }

    /// What must not be the target's own storage while it is read: the files below the image.
    var filesBelow: [FileIdentity] { Array(image.files.dropFirst()) }
}
