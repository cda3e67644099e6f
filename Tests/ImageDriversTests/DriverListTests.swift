import DiskImage
import Foundation
import ImageFormats
import ImageStorage
import Testing

@testable import ImageDrivers

/// The README's tables are those of the lists, and the lists make sense.
@Suite struct DriverListTests {
    private static let readme = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
        .deletingLastPathComponent().deletingLastPathComponent()
        .appendingPathComponent("README.md")

    private func row(_ cells: [String]) -> String { "| " + cells.joined(separator: " | ") + " |" }

    private func mark(_ isThere: Bool) -> String { isThere ? "yes" : "no" }

    @Test func readmeListsAllFormats() throws {
        let lines = try String(contentsOf: Self.readme, encoding: .utf8).split(separator: "\n")
        for format in ImageFormat.all {
            let driver = format.driver
            let expected = row([
                "`\(format.name)`", mark(driver.creator != nil),
                mark(driver.creator?.canCompress ?? false), mark(driver.canHaveBacking),
                mark(driver.checker != nil), mark(driver.resizer != nil),
            ])
            #expect(lines.contains { $0 == expected }, "README.md has no line \(expected)")
        }
    }

    @Test func readmeListsAllStorages() throws {
        let lines = try String(contentsOf: Self.readme, encoding: .utf8).split(separator: "\n")
        for driver in Storages.all {
            let start = row([
                driver.label, driver.names.map { "`\($0)`" }.joined(separator: ", "),
                mark(driver.changesInPlace),
            ]).dropLast(2)
            #expect(lines.contains { $0.hasPrefix(start) }, "README.md has no line \(start)")
        }
    }

    @Test func rawAndFilesComeLast() {
        #expect(ImageFormat.all.last?.driver.isPlain == true)
        #expect(ImageFormat.all.count { $0.driver.isPlain } == 1)
        #expect(Storages.all.last is FileDriver)
        #expect(Set(ImageFormat.all.map(\.name)).count == ImageFormat.all.count)
        let names = Storages.all.flatMap(\.names)
        #expect(Set(names).count == names.count)
    }

    /// A program is started, and keys are chosen, for a person only.
    @Test func imagesCannotNameServers() {
        let server = ImageName(bytes: [UInt8(ascii: "["), ImageName.mark] + Array("true".utf8))
        #expect(Storages.driver(for: server).label == "NBD")
        #expect(Storages.driver(for: server, isTyped: false) is FileDriver)
        #expect(Storages.driver(for: "nbds://host", isTyped: false) is FileDriver)
        #expect(Storages.driver(for: "nbd://host", isTyped: false).label == "NBD")
        #expect(Storages.driver(for: "disk.raw") is FileDriver)
        #expect(throws: ImageError.self) {
            _ = try ImageDescription("json:{\"file.filename\":\"[\\u001ftrue\"}")
        }
    }
}
