import DiskImage
import ImageStorage
import NBDStorage

/// All kinds of storage there are. The first one that claims a name opens it.
public enum Storages {
    public static let all: [any StorageDriver] = [
        NBDDriver(),
        NullDriver(),
        FileDriver(),
    ]

    /// The driver for a name.
    ///
    /// - Parameter isTyped: by a person; see `StorageDriver.claims`.
    public static func driver(
        for name: ImageName, isTyped: Bool = true
    ) -> any StorageDriver {
        all.first { $0.claims(name, isTyped: isTyped) } ?? FileDriver()
    }

    /// Whether no driver of other names claims a name.
    static func isPath(_ name: ImageName, isTyped: Bool) -> Bool {
        !all.dropLast().contains { $0.claims(name, isTyped: isTyped) }
    }

    /// The driver that a description names; nil if there is none.
    static func named(_ driver: String) -> (any StorageDriver)? {
        all.first { $0.names.contains(driver) }
    }
}
