import DiskImage

/// A disk image format. One list (`ImageFormat.all`) holds all formats, each with its driver.
public struct ImageFormat: Sendable, Equatable, CustomStringConvertible {
    public let driver: any FormatDriver

    public init(_ driver: any FormatDriver) { self.driver = driver }

    /// qemu's name for the format.
    public var name: String { driver.name }
    public var description: String { name }

    public static func == (left: ImageFormat, right: ImageFormat) -> Bool {
        left.name == right.name
    }
}
