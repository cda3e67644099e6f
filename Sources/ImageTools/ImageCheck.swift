import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage

/// One `swimg check`: checks an image, and checks it again if something was repaired.
public struct ImageCheck: Sendable {
    public var name: ImageName
    /// nil detects the format from the first bytes.
    public var format: ImageFormat?
    public var repair: CheckRepair?
    public var opener = ImageOpener()
    /// Called for each finding, with one line.
    public var onMessage: @Sendable (String) -> Void = { _ in }
    /// Called after a repair, before the image is checked again.
    public var onRepaired: @Sendable (CheckResult) -> Void = { _ in }

    public init(_ name: ImageName) { self.name = name }

    /// - Returns: nil if this format has no checker.
    /// - Throws: `ImageError` if the image cannot be opened or is too damaged to be checked.
    public func run() async throws -> CheckReport? {
        guard let repair else {
            let storage = try await name.opening { try await opener.openStorage(name) }
            let known = try await format(of: storage)
            guard let checker = known.driver.checker else {
                // A damaged image is an error, also where nothing checks it further.
                let key = opener.key(try ImageDescription(name))
                _ = try await known.driver.open(storage, snapshot: nil, key: key)
                return nil
            }
            let result = try await checker.check(storage, onMessage: onMessage)
            return CheckReport(path: name.description, format: known, result: result)
        }
        let storage = try await name.opening { try openInPlace() }
        let known = try await format(of: storage)
        guard let checker = known.driver.checker else { return nil }
        var result = try await checker.repair(storage, repair, onMessage: onMessage)
        if result.corruptionsFixed > 0 || result.leaksFixed > 0 {
            onRepaired(result)
            let repaired = result
            result = try await checker.check(storage, onMessage: onMessage)
            result.corruptionsFixed = repaired.corruptionsFixed
            result.leaksFixed = repaired.leaksFixed
        }
        return CheckReport(path: name.description, format: known, result: result)
    }

    private func format(of storage: any Storage) async throws -> ImageFormat {
        try await name.opening {
            try await opener.knownFormat(
                format, of: storage, described: try ImageDescription(name))
        }
    }

    private func openInPlace() throws -> any WritableStorage {
        guard !opener.access.shareForced else {
            throw ImageError.invalid(
                "-U cannot be used with -r: a repair needs the image for itself"
            ).asQemu("force-share=on can only be used with read-only images")
        }
        let described = try ImageDescription(name)
        let place = described?.place ?? name
        let driver = Storages.driver(for: place)
        guard driver.changesInPlace else {
            throw ImageError.unsupported(
                name.description, "images on \(driver.label) cannot be repaired")
        }
        guard described?.isWhole ?? true else {
            throw ImageError.unsupported(
                name.description, "an image that is a part of a file can only be read")
        }
        return try driver.openInPlace(place, opener.access)
    }
}

/// The result of a check in the forms that qemu-img prints.
public struct CheckReport: Sendable, Equatable {
    public let path: String
    public let format: ImageFormat
    public let result: CheckResult

    /// qemu-img's exit status; nil if the check itself failed.
    public var status: Int32? {
        if result.checkErrors > 0 { return nil }
        if result.corruptions > 0 { return 2 }
        return result.leaks > 0 ? 3 : 0
    }

    /// qemu-img's keys in its order; keys with the value 0 are omitted, except `check-errors`.
    public var json: JSONValue {
        var members: [JSONValue.Member] = []
        func add(_ key: String, _ number: Int64) {
            if number != 0 { members.append(.init(key, .integer(number))) }
        }
        add("image-end-offset", result.imageEndOffset)
        add("compressed-clusters", result.compressedClusters)
        add("total-clusters", result.totalClusters)
        add("corruptions", result.corruptions)
        add("corruptions-fixed", result.corruptionsFixed)
        members.append(.init("check-errors", .integer(result.checkErrors)))
        add("leaks", result.leaks)
        add("leaks-fixed", result.leaksFixed)
        add("allocated-clusters", result.allocatedClusters)
        members.append(.init("filename", .string(path)))
        members.append(.init("format", .string(format.name)))
        add("fragmented-clusters", result.fragmentedClusters)
        return .object(members)
    }

    /// The report for people, ending with a line break.
    public var text: String {
        var text = damage
        if result.totalClusters > 0, result.allocatedClusters > 0 {
            func percent(_ part: Int64, of whole: Int64) -> String {
                TextLayout.format("%.2f", Double(part) * 100 / Double(whole))
            }
            text +=
                "\(result.allocatedClusters)/\(result.totalClusters) = "
                + "\(percent(result.allocatedClusters, of: result.totalClusters))% allocated, "
                + "\(percent(result.fragmentedClusters, of: result.allocatedClusters))% fragmented, "
                + "\(percent(result.compressedClusters, of: result.allocatedClusters))% compressed "
                + "clusters\n"
        }
        if result.imageEndOffset > 0 { text += "Image end offset: \(result.imageEndOffset)\n" }
        return text
    }

    private var damage: String {
        guard result.corruptions > 0 || result.leaks > 0 || result.checkErrors > 0 else {
            return "No errors were found on the image.\n"
        }
        var text = ""
        if result.corruptions > 0 {
            text +=
                "\n\(result.corruptions) errors were found on the image.\n"
                + "Data may be corrupted, or further writes to the image may corrupt it.\n"
        }
        if result.leaks > 0 {
            text +=
                "\n\(result.leaks) leaked clusters were found on the image.\n"
                + "This means waste of disk space, but no harm to data.\n"
        }
        if result.checkErrors > 0 {
            text += "\n\(result.checkErrors) internal errors have occurred during the check.\n"
        }
        return text
    }

    /// The message between a repair and the check after it.
    public static func repairedText(_ result: CheckResult) -> String {
        """
        The following inconsistencies were found and repaired:

            \(result.leaksFixed) leaked clusters
            \(result.corruptionsFixed) corruptions

        Double checking the fixed image now...

        """
    }
}
