import CLinux
import Concurrency
import DiskImage
import Glibc
import Testing

@testable import ImageStorage

@Suite struct WriteJoinerTests {
    /// Each of 8 tasks writes to several places in one call, which returns when all are written.
    @Test func oneCallWritesToManyPlaces() async throws {
        let blockSize = 64 << 10
        let descriptor = try Syscall.open("/tmp", flags: O_RDWR | clinux_O_TMPFILE, mode: 0o600)
        defer { close(descriptor) }
        let joiner = WriteJoiner(descriptor: descriptor, name: "places")
        try await withTaskExecutorPreference(IOExecutor.shared) {
            try await withThrowingTaskGroup(of: Void.self) { group in
                for worker in 0..<8 {
                    group.addTask {
                        var buffer = try IOBuffer.zeros(byteCount: 5 * blockSize)
                        for round in 0..<8 {
                            let first = (round * 8 + worker) * 10
                            var bytes = buffer.mutableBytes
                            let memory = bytes.withUnsafeMutableBytes { $0 }
                            let writes = (0..<5).map { place in
                                let part = UnsafeMutableRawBufferPointer(
                                    rebasing: memory[place * blockSize..<(place + 1) * blockSize])
                                part.initializeMemory(
                                    as: UInt8.self, repeating: UInt8((first + place) % 251 + 1))
                                return PendingWrite(
                                    offset: Int64((first + 2 * place) * blockSize),
                                    pieces: [UnsafeRawBufferPointer(part)])
                            }
                            try await joiner.write(writes)
                            // A task that is resumed too early overwrites bytes that the writer
                            // still reads.
                            memory.initializeMemory(as: UInt8.self, repeating: 0)
                        }
                    }
                }
                for try await _ in group {}
            }
        }
        var found = [UInt8](repeating: 0, count: 640 * blockSize)
        let count = try found.withUnsafeMutableBytes {
            try Syscall.read(descriptor, "places", into: $0, at: 0)
        }
        #expect(count == 639 * blockSize)
        let wrong = (0..<640).first { block in
            let (first, place) = (block / 10 * 10, block % 10)
            let expected = place % 2 == 0 ? UInt8((first + place / 2) % 251 + 1) : 0
            return found[block * blockSize..<(block + 1) * blockSize].contains { $0 != expected }
        }
        #expect(wrong == nil)
    }

    /// One place that cannot be written is an error for all, first or last; the other is written.
    @Test(arguments: [-4096, Int64.max & ~4095])
    func oneFailureIsEnough(offset: Int64) async throws {
        let descriptor = try Syscall.open("/tmp", flags: O_RDWR | clinux_O_TMPFILE, mode: 0o600)
        defer { close(descriptor) }
        let joiner = WriteJoiner(descriptor: descriptor, name: "half")
        var buffer = try IOBuffer(byteCount: 1 << 16)
        var bytes = buffer.mutableBytes
        let memory = bytes.withUnsafeMutableBytes { $0 }
        memory.initializeMemory(as: UInt8.self, repeating: 3)
        let pieces = [UnsafeRawBufferPointer(memory)]
        await #expect(throws: ImageError.self) {
            try await joiner.write(
                [offset, 4096].map { PendingWrite(offset: $0, pieces: pieces) })
        }
        var found = [UInt8](repeating: 1, count: 1 << 18)
        let count = try found.withUnsafeMutableBytes {
            try Syscall.read(descriptor, "half", into: $0, at: 0)
        }
        #expect(count == 4096 + 65536)
        #expect(found[4096..<count].allSatisfy { $0 == 3 })
    }

    /// If storage waits, the first writes show it, and the others are made concurrently.
    @Test func writesBesideEachOtherWhereWritesWait() async throws {
        let descriptor = try Syscall.open("/tmp", flags: O_RDWR | clinux_O_TMPFILE, mode: 0o600)
        defer { close(descriptor) }
        let joiner = WriteJoiner(descriptor: descriptor, name: "slow")
        let blocks = (0..<64).map { [UInt8](repeating: UInt8($0), count: 4096) }
        try await withTaskExecutorPreference(IOExecutor.shared) {
            try await withThrowingTaskGroup(of: Void.self) { group in
                for (number, block) in blocks.enumerated() {
                    group.addTask {
                        if number == 20 {
                            for _ in 0..<9 {
                                joiner.noteLone(.call(wall: 50_000_000, work: 100_000))
                            }
                        }
                        let bytes = UnsafeMutableRawBufferPointer.allocate(
                            byteCount: 4096, alignment: 8)
                        defer { bytes.deallocate() }
                        bytes.copyBytes(from: block)
                        try await joiner.write([
                            PendingWrite(
                                offset: Int64(number * 4096),
                                pieces: [UnsafeRawBufferPointer(bytes)])
                        ])
                    }
                }
                try await group.waitForAll()
            }
        }
        var found = [UInt8](repeating: 0xee, count: 64 * 4096)
        try found.withUnsafeMutableBytes {
            _ = try Syscall.read(descriptor, "slow", into: $0, at: 0)
        }
        #expect(found == blocks.flatMap { $0 })
    }

    /// 64 tasks write every 64th block each: nothing is lost, mixed up or written twice.
    @Test func joinsManyWriters() async throws {
        let blockSize = 5000
        let descriptor = try Syscall.open("/tmp", flags: O_RDWR | clinux_O_TMPFILE, mode: 0o600)
        defer { close(descriptor) }
        let joiner = WriteJoiner(descriptor: descriptor, name: "joined")
        try await withTaskExecutorPreference(IOExecutor.shared) {
            try await withThrowingTaskGroup(of: Void.self) { group in
                for worker in 0..<64 {
                    group.addTask {
                        for block in stride(from: worker, to: 6400, by: 64) {
                            let bytes = UnsafeMutableRawBufferPointer.allocate(
                                byteCount: blockSize, alignment: 8)
                            defer { bytes.deallocate() }
                            bytes.initializeMemory(as: UInt8.self, repeating: UInt8(block % 251))
                            try await joiner.write([
                                PendingWrite(
                                    offset: Int64(block * blockSize),
                                    pieces: [UnsafeRawBufferPointer(bytes)])
                            ])
                        }
                    }
                }
                for try await _ in group {}
            }
        }
        var found = [UInt8](repeating: 0, count: 6400 * blockSize + 1)
        let count = try found.withUnsafeMutableBytes {
            try Syscall.read(descriptor, "joined", into: $0, at: 0)
        }
        #expect(count == 6400 * blockSize)
        let wrong = (0..<6400).first { block in
            found[block * blockSize..<(block + 1) * blockSize].contains { $0 != UInt8(block % 251) }
        }
        #expect(wrong == nil)
    }

    /// Every task whose bytes were not written gets an error.
    @Test func errorReachesAll() async throws {
        let descriptor = try Syscall.open("/dev/full", flags: O_WRONLY)
        defer { close(descriptor) }
        let joiner = WriteJoiner(descriptor: descriptor, name: "full")
        let failures = await withTaskGroup(of: Bool.self) { group in
            for worker in 0..<32 {
                group.addTask {
                    let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: 8, alignment: 8)
                    defer { bytes.deallocate() }
                    bytes.initializeMemory(as: UInt8.self, repeating: 1)
                    do {
                        // A second, distant place fails, too.
                        try await joiner.write(
                            [0, 1 << 20].map {
                                PendingWrite(
                                    offset: Int64($0 + worker * 8),
                                    pieces: [UnsafeRawBufferPointer(bytes)])
                            })
                        return false
                    } catch {
                        return (error as? ImageError)?.kind == .system(errno: ENOSPC)
                    }
                }
            }
            return await group.reduce(into: 0) { $0 += $1 ? 1 : 0 }
        }
        #expect(failures == 32)
    }
}
