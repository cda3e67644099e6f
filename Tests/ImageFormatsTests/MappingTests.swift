import DiskImage
import ImageStorage
import MemoryImages
import Testing

@testable import ImageFormats

/// Holes and ends of the file below the clusters of an image.
@Suite struct MappingTests {
    /// An image of one stretch of clusters of 1024 bytes in a file of two and a half of them.
    private struct Clusters: Image {
        let storage: any Storage = MemoryStorage([UInt8](repeating: 7, count: 2560))
        let host: Int64
        let isAhead: Bool
        let virtualSize: Int64 = 4096
        var readGranularity: Int64 { 1024 }
        func isPreallocated() async throws -> Bool { isAhead }
        func mappings(
            at offset: Int64, limit: Int64, holes: HoleSearch
        ) async throws -> [Mapping] {
            try await settled(
                [Mapping(offset..<limit, .data, hostOffset: host + offset)], clusterSize: 1024,
                holes)
        }
    }

    private func found(
        at host: Int64, from offset: Int64 = 0, isAhead: Bool = false,
        holes: HoleSearch = .thorough
    ) async throws -> [Mapping] {
        try await Clusters(host: host, isAhead: isAhead).mappings(
            at: offset, limit: 4096, holes: holes)
    }

    @Test func theRestOfTheLastClusterIsAHole() async throws {
        #expect(
            try await found(at: 1024) == [
                Mapping(0..<1536, .data, hostOffset: 1024),
                Mapping(1536..<2048, .preallocated, hostOffset: 2560),
                Mapping(2048..<4096, .missing, hostOffset: 3072),
            ])
        #expect(
            try await found(at: 1024, from: 1600)[0]
                == Mapping(1600..<2048, .preallocated, hostOffset: 2624))
    }

    /// Clusters need not lie at multiples of their size: that depends on the format.
    @Test func theLastClusterBeginsAnywhere() async throws {
        #expect(
            try await found(at: 512) == [
                Mapping(0..<2048, .data, hostOffset: 512),
                Mapping(2048..<4096, .missing, hostOffset: 2560),
            ])
        #expect(
            try await found(at: 1100) == [
                Mapping(0..<1460, .data, hostOffset: 1100),
                Mapping(1460..<2048, .preallocated, hostOffset: 2560),
                Mapping(2048..<4096, .missing, hostOffset: 3148),
            ])
    }

    /// qemu looks below clusters only where an image allocates ahead of its data.
    @Test func asQemuLooks() async throws {
        #expect(
            try await found(at: 1024, holes: .asQemu)
                == [Mapping(0..<4096, .data, hostOffset: 1024)])
        #expect(try await found(at: 1024, isAhead: true, holes: .asQemu).count == 3)
    }

    @Test func wholeClustersBehindTheEndAreAnError() async throws {
        let image = Clusters(host: 1024, isAhead: false)
        var buffer = try IOBuffer(byteCount: 2048)
        var bytes = buffer.mutableBytes
        try await image.read(into: &bytes, at: 0)
        #expect(
            buffer.bytes.withUnsafeBytes { Array($0) }
                == [UInt8](repeating: 7, count: 1536) + [UInt8](repeating: 0, count: 512))
        var more = try IOBuffer(byteCount: 1)
        var byte = more.mutableBytes
        await #expect(throws: ImageError.self) { try await image.read(into: &byte, at: 2048) }
    }

    @Test func clippedKeepsItsPlace() {
        var mapping = Mapping(100..<200, .data, hostOffset: 1000)
        mapping.layerOffset = 50
        let part = mapping.clipped(to: 130..<500)
        #expect(part.range == 130..<200 && part.host == 1030..<1100 && part.layerOffset == 80)
        // A stream has to be read whole.
        mapping.content = .compressed
        #expect(mapping.clipped(to: 130..<140).host == 1000..<1100)
    }
}
