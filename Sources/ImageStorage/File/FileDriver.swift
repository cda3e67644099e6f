import DiskImage

/// The driver of files and devices of this machine. It is the last in the list: any name that no
/// other driver claims is a path.
public struct FileDriver: StorageDriver {
    public let label = "files"
    public let names = ["file", "host_device"]
    public let changesInPlace = true

    public init() {}

    public func claims(_ name: ImageName, isTyped: Bool) -> Bool { true }

    public func check(_ name: ImageName) throws(ImageError) { _ = try name.path() }

    public func name(
        from options: inout DescribedOptions, prefix: String
    ) throws(ImageError) -> ImageName {
        guard let path = try options.bytes(prefix + "filename"), !path.isEmpty else {
            throw options.invalid("'\(prefix)filename' is missing")
        }
        // The options name this driver, so the name is a path whatever it looks like.
        return HostPath(bytes: path).name
    }

    public func name(of path: HostPath, in image: ImageName) -> ImageName? {
        (try? image.path())?.resolving(path).name
    }

    /// Whether two paths lead to one file, which need not exist yet.
    public static func isOneFile(_ one: HostPath, _ other: HostPath) -> Bool {
        if let file = FileIdentity(path: one) { return file == FileIdentity(path: other) }
        guard let first = try? TargetFolder.behindLinks(one),
            let second = try? TargetFolder.behindLinks(other)
        else { return false }
        return first.fileName == second.fileName && first.identity == second.identity
    }

    public func openSource(
        _ name: ImageName, _ access: StorageAccess
    ) throws(ImageError) -> any Storage {
        try FileStorage.openSource(
            name.path(), cacheMode: access.cacheMode, shareForced: access.shareForced)
    }

    public func openInPlace(
        _ name: ImageName, _ access: StorageAccess
    ) throws(ImageError) -> any WritableStorage {
        try FileStorage.openExistingTarget(name.path(), cacheMode: access.cacheMode)
    }

    public func beginTarget(
        _ name: ImageName, _ request: TargetRequest
    ) throws(ImageError) -> any StorageTarget {
        let path = try name.path()
        let cacheMode = request.access.cacheMode
        if let pipe = try DescriptorSink.named(path, protecting: request.sourceFiles) {
            return TargetInPlace(pipe)
        }
        return switch request.manner {
        case .create:
            try TargetFile.create(path, cacheMode: cacheMode, protecting: request.sourceFiles)
        case .writeInto:
            try TargetFile.openExisting(
                path, cacheMode: cacheMode, protecting: request.sourceFiles)
        }
    }
}

extension TargetFile: StorageTarget {}
