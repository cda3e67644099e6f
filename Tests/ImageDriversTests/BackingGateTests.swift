import DiskImage
import Foundation
import ImageFormats
import ImageStorage
import Synchronization
import Testing

@testable import ImageDrivers

/// Every file that a header leads to passes the gate; those that a person names do not.
@Suite struct BackingGateTests {
    private let folder = FileManager.default.temporaryDirectory
        .appendingPathComponent("gate-\(UUID().uuidString)").path

    init() async throws {
        try FileManager.default.createDirectory(
            atPath: folder, withIntermediateDirectories: true)
        for name in ["base", "other"] {
            try Data(repeating: 1, count: 65536).write(
                to: URL(fileURLWithPath: "\(folder)/\(name)"))
        }
        try await makeOverlay("middle", of: "\(folder)/other", "raw")
        try await makeOverlay("top", of: described, "qcow2")
    }

    /// `middle`, and below it not what its header names.
    private var described: String {
        #"json:{"driver":"qcow2","file":{"driver":"file","filename":"\#(folder)/middle"},"#
            + #""backing":{"driver":"raw","file":{"driver":"file","filename":"\#(folder)/base"}}}"#
    }

    private func makeOverlay(_ name: String, of backing: String, _ format: String) async throws {
        let creator = try #require(ImageFormat.qcow2.driver.creator)
        var image = try creator.newImage(TypedOptions(CreationOptions(), for: .qcow2))
        image.setBacking(BackingName(ImageName(backing), format: format), virtualSize: 65536)
        let target = try FileDriver().beginTarget(
            ImageName("\(folder)/\(name)"), TargetRequest(.create, access: StorageAccess()))
        try await image.makeEmpty(on: target.storage, size: 65536)
        try await target.commit()
    }

    private func namesAtTheGate(_ name: String) async throws -> [String] {
        let names = Mutex<[String]>([])
        let opener = ImageOpener { name, overlay in
            names.withLock { $0.append("\(overlay)>\(name)") }
        }
        _ = try await opener.openChain(ImageName(name), format: nil)
        return names.withLock { $0 }.map { $0.replacing(folder + "/", with: "") }
    }

    @Test func describedFilesOfHeadersPassIt() async throws {
        #expect(try await namesAtTheGate("\(folder)/top") == ["top>middle", "top>base"])
    }

    @Test func describedFilesOfAPersonDoNot() async throws {
        #expect(try await namesAtTheGate(described) == [])
        #expect(try await namesAtTheGate("\(folder)/middle") == ["middle>other"])
        let half = #"json:{"file.filename":"\#(folder)/middle","backing":{"driver":"raw"}}"#
        #expect(try await namesAtTheGate(half) == ["middle>other"])
    }

    @Test func theGateRefuses() async throws {
        let opener = ImageOpener { name, _ in
            if name.description.hasSuffix("/base") { throw ImageError.invalid("closed") }
        }
        await #expect(throws: ImageError.self) {
            _ = try await opener.openChain(ImageName("\(folder)/top"), format: nil)
        }
        _ = try await opener.openChain(ImageName("\(folder)/middle"), format: nil)
    }
}
