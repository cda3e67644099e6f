import DiskImage
import ImageStorage
import MemoryImages
import Testing

@testable import ImageFormats

/// The order of writes to an image that is changed in place, and what a failure leaves.
@Suite struct Qcow2WritableImageTests {
    private static let header = Qcow2Header.changeableOffset..<96

    private func storage() async throws -> MemoryStorage {
        var options = Qcow2Options()
        options.clusterSize = 512
        let bytes = [UInt8](repeating: 1, count: 100 << 10)
        return try await Qcow2WriteTests().write(bytes, options, minSparse: 512)
    }

    private func sound(
        _ storage: MemoryStorage
    ) async throws -> (image: Qcow2WritableImage, refcounts: Qcow2Refcounts) {
        try await Qcow2WritableImage.sound(storage, try await Qcow2Header.read(from: storage))
    }

    /// New structures are on stable storage before the header leads to them, and the header is
    /// before anything that counts on it.
    @Test func theHeaderComesBetweenFlushes() async throws {
        let storage = try await storage()
        var (image, refcounts) = try await sound(storage)
        let before = storage.operations.count
        let cluster = try await refcounts.allocate(1)
        try await storage.writeWords(image.l1, at: cluster * 512)
        try await refcounts.settle()
        let written = storage.operations.count
        #expect(!storage.operations[before...].contains(.flush))
        try await image.changeHeader { $0.l1Offset = HostOffset(cluster * 512) }
        #expect(storage.operations[written...] == [.flush, .write(Self.header), .flush])
        let header = try await Qcow2Header.read(from: storage)
        #expect(image.isSwitched && image.header == header)
        let count = storage.operations.count
        try await image.writeL1(1..<2)
        let place = cluster * 512 + 8
        #expect(storage.operations[count...] == [.write(place..<place + 8)])
    }

    /// Flush, write, flush: each fails in turn. The old header is on disk then.
    @Test(arguments: 0..<3)
    func aFailureRestoresTheHeader(_ operation: Int) async throws {
        let storage = try await storage()
        var (image, _) = try await sound(storage)
        let (bytes, header) = (storage.bytes, image.header)
        storage.fail(at: operation)
        await #expect(throws: MemoryStorage.failure) {
            try await image.changeHeader { $0.geometry.virtualSize += 512 }
        }
        #expect(!image.isSwitched && image.header == header && storage.bytes == bytes)
    }

    /// If the old header cannot be restored, nothing may be taken back, because either header may
    /// be on disk.
    @Test func aHeaderThatCannotBeRestoredCountsAsSwitched() async throws {
        let storage = try await storage()
        var image = try await Qcow2WritableImage.damaged(storage)
        storage.fail(at: 2, count: 2)
        await #expect(throws: MemoryStorage.failure) {
            try await image.changeHeader { $0.geometry.virtualSize += 512 }
        }
        #expect(image.isSwitched)
    }

    @Test func unknownAutoclearBitsAreCleared() async throws {
        let storage = try await storage()
        var (image, _) = try await sound(storage)
        try await image.changeHeader { $0.autoclearFeatures = 1 << 9 | 1 }
        #expect(try await Qcow2Header.read(from: storage, for: .checking).autoclearFeatures == 1)
    }

    @Test func anImageUnderExaminationIsNotWritten() async throws {
        let storage = try await storage()
        var image = try await Qcow2WritableImage.examining(storage)
        let bytes = storage.bytes
        await #expect(throws: ImageError.self) { try await image.changeHeader { $0.version = 2 } }
        await #expect(throws: ImageError.self) { try await image.writeL1(0..<1) }
        #expect(storage.bytes == bytes && !image.isSwitched)
    }
}
