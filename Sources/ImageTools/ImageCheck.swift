import DiskImage
import Glibc
import ImageDrivers
import ImageFormats
import ImageStorage

/// One `check`: opens an image, checks it, and once more if something was repaired.
public struct ImageCheck: Sendable {
    public var name: ImageName
    /// nil looks at the first bytes.
    public var format: ImageFormat?
    public var repair: CheckRepair?
    public var opener = ImageOpener()
    /// Told of each finding, one line each.
    public var onMessage: @Sendable (String) -> Void = { _ in }
    /// Told what has been repaired, before the image is checked again.
    public var onRepaired: @Sendable (CheckResult) -> Void = { _ in }

    public init(_ name: ImageName) { self.name = name }

    /// - Returns: nil if images of this format cannot be checked.
    /// - Throws: `ImageError` if the image cannot be opened, or so damaged that the check cannot go on.
    public func run() async throws -> CheckReport? {
        guard let repair else {
            let storage = try opener.openStorage(name)
            let known = try await format(of: storage)
            return try await known.driver.checker?.check(storage, onMessage: onMessage)
                .report(name, known)
        }
        let storage = try openInPlace()
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
        return result.report(name, known)
    }

    private func format(of storage: any Storage) async throws -> ImageFormat {
        try await opener.knownFormat(
            format, of: storage, described: try ImageDescription(name))
    }

    private func openInPlace() throws -> any WritableStorage {
        guard !opener.access.shareForced else {
            throw ImageError.invalid(
                "an image is not repaired while another process may write (-U)")
        }
        let described = try ImageDescription(name)
        let place = described?.place ?? name
        let driver = Storages.driver(for: place)
        guard driver.changesInPlace else {
            throw ImageError.unsupported(
                name.description, "an image behind \(driver.label) cannot be repaired")
        }
        guard described?.isWhole ?? true else {
            throw ImageError.unsupported(name.description, "a part of a file can only be read")
        }
        return try driver.openInPlace(place, opener.access)
    }
}

extension CheckResult {
    fileprivate func report(_ name: ImageName, _ format: ImageFormat) -> CheckReport {
        CheckReport(path: name.description, format: format, result: self)
    }
}

/// The outcome of a check as qemu-img shows it.
public struct CheckReport: Sendable, Equatable {
    public let path: String
    public let format: ImageFormat
    public let result: CheckResult

    public init(path: String, format: ImageFormat, result: CheckResult) {
        self.path = path
        self.format = format
        self.result = result
    }

    /// qemu-img's exit status; nil where the check itself has failed.
    public var status: Int32? {
        if result.checkErrors > 0 { return nil }
        if result.corruptions > 0 { return 2 }
        return result.leaks > 0 ? 3 : 0
    }

    /// With qemu-img's keys in its order; those whose number is 0 are left out, except `check-errors`.
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

    /// What people read, with a line break at the end.
    public var text: String {
        var text = damage
        if result.totalClusters > 0, result.allocatedClusters > 0 {
            func percent(_ part: Int64, of whole: Int64) -> String {
                Self.twoDigits(Double(part) * 100 / Double(whole))
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

    /// What is said between a repair and the check after it.
    public static func repairedText(_ result: CheckResult) -> String {
        """
        The following inconsistencies were found and repaired:

            \(result.leaksFixed) leaked clusters
            \(result.corruptionsFixed) corruptions

        Double checking the fixed image now...

        """
    }

    /// As C's printf rounds it.
    private static func twoDigits(_ number: Double) -> String {
        var text = [CChar](repeating: 0, count: 32)
        let length = withVaList([number]) { vsnprintf(&text, text.count, "%.2f", $0) }
        return String(decoding: text.prefix(Int(length)).map(UInt8.init), as: UTF8.self)
    }
}
