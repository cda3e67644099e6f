import DiskImage
import MemoryImages
import Testing

@testable import ImageFormats

@Suite struct Qcow2HeaderTests {
    private func header(version: Int) -> Qcow2Header {
        var header = Qcow2Header(
            version: version,
            geometry: Qcow2Geometry(clusterBits: 16, hasExtendedL2: false, virtualSize: 5 << 30),
            compression: .zlib, backingFile: "base image.qcow2", backingFormat: "qcow2",
            l1Offset: HostOffset(3 << 16), l1Entries: 10, refcountTableOffset: HostOffset(1 << 16),
            refcountTableClusters: 2)
        header.snapshotCount = 3
        header.snapshotTableOffset = 9 << 16
        header.encryptionMethod = Qcow2Header.luks
        header.encryptionHeader = .init(offset: 7 << 16, length: 4096)
        header.otherExtensions = [
            .init(type: Qcow2Header.ExtensionType.featureNames, content: Array(0..<96)),
            .init(type: 0x1234_5678, content: [1, 2, 3]),
        ]
        guard version >= 3 else { return header }
        header.compression = .zstd
        header.refcountBits = 64
        header.incompatibleFeatures =
            Qcow2Header.IncompatibleFeature.compressionType | Qcow2Header.IncompatibleFeature.dirty
            | Qcow2Header.IncompatibleFeature.externalDataFile
        header.compatibleFeatures = 1 | 1 << 63
        header.autoclearFeatures = 3
        header.dataFile = "data.raw"
        let directory: [UInt8] = [0, 0, 0, 2, 0, 0, 0, 0] + Array(repeating: 1, count: 16)
        header.bitmapExtension = Qcow2BitmapDirectory(directory.span.bytes)
        header.otherFields = [1, 2, 3, 4, 5, 6, 7, 8]
        return header
    }

    /// A header is written back with everything that was read of it, also what is unknown here.
    @Test(arguments: [2, 3])
    func isWrittenBackWhole(_ version: Int) async throws {
        let header = header(version: version)
        let bytes = try header.serialized()
        let read = try await Qcow2Header.read(from: MemoryStorage(bytes), for: .describing)
        #expect(read == header)
        #expect(try read.serialized() == bytes)
    }

    @Test func eachFieldCounts() async throws {
        let whole = header(version: 3)
        var changed = whole
        changed.otherExtensions[1].content = [1, 2, 4]
        #expect(try changed.serialized() != whole.serialized())
        changed = whole
        changed.otherFields[7] = 0
        #expect(try changed.serialized() != whole.serialized())
        changed = whole
        changed.autoclearFeatures = 2
        #expect(try changed.serialized() != whole.serialized())
    }

    /// A check takes headers that nothing can be read by.
    @Test func checksTakeMore() async throws {
        var plain = header(version: 3)
        plain.encryptionMethod = 0
        plain.encryptionHeader = nil
        var bytes = try plain.serialized()
        // The name of the backing file begins within the fields.
        bytes.replaceSubrange(8..<16, with: [0, 0, 0, 0, 0, 0, 0, 24])
        let storage = MemoryStorage(bytes)
        _ = try await Qcow2Header.read(from: storage, for: .checking)
        for purpose in [Qcow2HeaderParser.Purpose.reading, .describing] {
            await #expect(throws: ImageError.self) {
                _ = try await Qcow2Header.read(from: storage, for: purpose)
            }
        }
        // The disk can be read, whatever becomes of its snapshots.
        var lost = header(version: 3)
        lost.snapshotTableOffset = 5
        let other = MemoryStorage(try lost.serialized())
        for purpose in [Qcow2HeaderParser.Purpose.reading, .checking] {
            let read = try await Qcow2Header.read(from: other, for: purpose)
            #expect(read.snapshotTableOffset == 5)
        }
        await #expect(throws: ImageError.self) {
            _ = try await Qcow2Header.read(from: other, for: .describing)
        }
    }
}
