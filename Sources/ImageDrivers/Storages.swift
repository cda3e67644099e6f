import DiskImage
import HTTPStorage
import ImageStorage
import ImageioStorage
import NBDStorage

/// The list of the kinds of storage. The first one that claims a name opens it.
public enum Storages {
    public static let all: [any StorageDriver] = [
        NBDDriver(),
        HTTPDriver(),
        ImageioDriver(),
        NullDriver(),
        FileDriver(),
    ]

    /// Finds the driver for a name.
    ///
    /// - Parameter isTyped: whether a person typed the name; see `StorageDriver.claims`.
    public static func driver(
        for name: ImageName, isTyped: Bool = true
    ) -> any StorageDriver {
        all.first { $0.claims(name, isTyped: isTyped) } ?? FileDriver()
    }

    /// Whether a name is the path of a file: no other driver claims it.
    static func isPath(_ name: ImageName, isTyped: Bool) -> Bool {
        !all.dropLast().contains { $0.claims(name, isTyped: isTyped) }
    }

    /// Finds the driver that a description names.
    static func named(_ driver: String) -> (any StorageDriver)? {
        all.first { $0.names.contains(driver) }
    }
}
