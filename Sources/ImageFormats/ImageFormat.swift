import DiskImage

/// A disk format. All of them stand in one list (`ImageFormat.all`), each with its driver.
public struct ImageFormat: Sendable, Hashable, CustomStringConvertible {
    public let driver: any FormatDriver

    public init(_ driver: any FormatDriver) { self.driver = driver }

    /// qemu's name of it.
    public var name: String { driver.name }
    public var description: String { name }

    public static func == (left: ImageFormat, right: ImageFormat) -> Bool {
        left.name == right.name
    }

    public func hash(into hasher: inout Hasher) { hasher.combine(name) }
}
