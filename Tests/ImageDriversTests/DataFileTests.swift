import DiskImage
import Foundation
import ImageFormats
import ImageStorage
import Synchronization
import Testing

@testable import ImageDrivers

/// Data files open through the gate for names that stand in images, and are begun and committed
/// with their image.
@Suite struct DataFileTests {
    private let folder: URL

    init() throws {
        folder = FileManager.default.temporaryDirectory
            .appendingPathComponent("swimg-test-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: false)
    }

    private func path(_ name: String) -> String { folder.appendingPathComponent(name).path }

    private var names: [String] {
        (try? FileManager.default.contentsOfDirectory(atPath: folder.path))?.sorted() ?? []
    }

    /// Makes an image with a data file, and calls `body` before both get their names.
    private func makeImage(_ body: (TargetFiles) throws -> Void = { _ in }) async throws {
        let options = try CreationOptions([Array("data_file=\(path("data"))".utf8)])
        var image = try ImageFormat.qcow2.creator()
            .newImage(TypedOptions(options, for: .qcow2))
        let files = try TargetFiles(
            beginning: ImageName(path("image")), image.parameters,
            TargetRequest(.create, access: StorageAccess()))
        image.setData(try #require(files.dataStorage))
        try await image.makeEmpty(on: files.storage, size: 1 << 20)
        try body(files)
        try await files.commit()
    }

    @Test func bothFilesGetTheirNamesInTheEnd() async throws {
        defer { try? FileManager.default.removeItem(at: folder) }
        try await makeImage { _ in #expect(names.isEmpty) }
        #expect(names == ["data", "image"])
    }

    @Test func neitherFileIsLeftWhenAbandoned() async throws {
        defer { try? FileManager.default.removeItem(at: folder) }
        struct Stop: Error {}
        await #expect(throws: Stop.self) {
            try await makeImage {
                $0.abandon()
                throw Stop()
            }
        }
        #expect(names.isEmpty)
    }

    @Test func theGateDecides() async throws {
        defer { try? FileManager.default.removeItem(at: folder) }
        try await makeImage()
        let (image, data) = (ImageName(path("image")), ImageName(path("data")))
        struct Closed: Error {}
        let closed = ImageOpener { name, namedBy in
            #expect(name == data && namedBy == image)
            throw Closed()
        }
        await #expect(throws: Closed.self) { try await closed.open(image, format: .qcow2) }
        // Without a lock, because the data file is opened for writing, too.
        let open = try await ImageOpener(StorageAccess(shareForced: true))
            .open(image, format: .qcow2)
        #expect(open.layers[0].dataName == data && open.files.count == 2)
        #expect(throws: Closed.self) {
            try closed.openDataInPlace(of: open.topLayer, at: image)
        }

        // A name that a person typed passes.
        let typed = ImageDescription.name(
            fromOptions: Array("file.filename=\(path("image")),data-file.filename=\(data)".utf8))
        _ = try await closed.open(typed, format: nil)

        // One in the description of a backing file does not.
        let json = #"json:{"file.filename":"\#(image)","data-file.filename":"\#(data)"}"#
        let asked = Mutex<[ImageName]>([])
        let watched = ImageOpener { name, _ in asked.withLock { $0.append(name) } }
        _ = try await watched.openBackingChain(
            BackingName(ImageName(json), format: "qcow2"), of: "over",
            in: NullStorage(name: "over", size: 0))
        #expect(asked.withLock { $0 } == [image, data])

        let written = try ImageOpener().openDataInPlace(of: open.topLayer, at: image)
        #expect(written?.size == 1 << 20)
    }
}
