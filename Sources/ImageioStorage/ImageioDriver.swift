import DiskImage
import HTTPStorage
import ImageStorage

/// The driver of disks that ovirt-imageio daemons serve.
public struct ImageioDriver: StorageDriver {
    public let label = "imageio"
    public let names: [String] = []
    public let checksums = true

    public init() {}

    /// A ticket is a password, so no image may bring one along.
    public func claims(_ name: ImageName, isTyped: Bool) -> Bool {
        isTyped && ImageioAddress.isImageio(name)
    }

    public func check(_ name: ImageName) throws(ImageError) { _ = try ImageioAddress(name) }

    public func name(
        from options: inout DescribedOptions, prefix: String
    ) throws(ImageError) -> ImageName {
        throw options.invalid("disks of ovirt-imageio have no options")
    }

    public func shownName(_ name: ImageName) -> String {
        (try? ImageioAddress(name))?.label ?? name.description
    }

    public func openSource(
        _ name: ImageName, _ access: StorageAccess
    ) throws(ImageError) -> any Storage {
        try ImageioStorage(ImageioAddress(name), access.options.http, forWriting: false)
    }

    public func beginTarget(
        _ name: ImageName, _ request: TargetRequest
    ) throws(ImageError) -> any StorageTarget {
        let address = try ImageioAddress(name)
        guard request.isCopyInPlace || !request.sourceNames.contains(name) else {
            throw .invalid("the target '\(address.label)' is also the source")
        }
        return TargetInPlace(
            try ImageioStorage(address, request.access.options.http, forWriting: true))
    }
}
