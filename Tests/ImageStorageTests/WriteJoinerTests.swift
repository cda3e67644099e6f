import CLinux
import Concurrency
import DiskImage
import Glibc
import Testing

@testable import ImageStorage

@Suite struct WriteJoinerTests {
    /// Each of 8 tasks writes to several places in one call, which returns when all are written.
    @Test(arguments: [false, true])
    func oneCallWritesToManyPlaces(isDirect: Bool) async throws {
        let blockSize = 64 << 10
        let descriptor = try Syscall.open("/tmp", flags: O_RDWR | clinux_O_TMPFILE, mode: 0o600)
        defer { close(descriptor) }
        var bypass = PageCacheBypass(descriptor, chooser: WritePathChooser(isDirect: isDirect))
        if PageCacheBypass.isPossible(descriptor) {
            let isTogether = bypass.together != nil
            #expect(isTogether == isDirect)
        }
        let joiner = WriteJoiner(descriptor: descriptor, name: "places", bypass: bypass)
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

    /// An error of one write does not reach the others. Direct writes end later than they begin.
    @Test(arguments: [0, clinux_O_DIRECT])
    func togetherEachWriteHasItsOwnResult(flags: Int32) throws {
        let file = try Syscall.open("/tmp", flags: O_RDWR | clinux_O_TMPFILE, mode: 0o600)
        defer { close(file) }
        if flags != 0, !PageCacheBypass.isPossible(file) { return }
        let descriptor = try Syscall.open(HostPath("/proc/self/fd/\(file)"), flags: O_RDWR | flags)
        defer { close(descriptor) }
        var queue: UInt = 0
        try #require(clinux_open_queue(&queue) == 0)
        defer { clinux_close_queue(queue) }
        var buffer = try IOBuffer(byteCount: 1 << 20)
        var bytes = buffer.mutableBytes
        let memory = bytes.withUnsafeMutableBytes { $0 }
        memory.initializeMemory(as: UInt8.self, repeating: 7)
        let halves = [memory[..<(1 << 19)], memory[(1 << 19)...]].map {
            UnsafeRawBufferPointer(rebasing: UnsafeRawBufferPointer(memory)[$0.indices])
        }
        // Beyond what ext4 and XFS can address. A single write shows the expected result.
        let far: Int64 = 1 << 62
        let single = Result { () throws(ImageError) in
            try Syscall.write(descriptor, "some", halves, at: far)
            return true
        }
        let offsets = [1 << 20, far, 8 << 20, -4096]
        let results = Syscall.writeTogether(
            queue, descriptor, "some", offsets.map { (pieces: halves, offset: $0) })
        #expect(results[0] == .success(true))
        #expect(results[1] == single)
        if PageCacheBypass.isPossible(file) { #expect((try? single.get()) == nil) }
        #expect(results[2] == .success(true))
        // Impossible in this way: the caller repeats it alone and gets the error.
        #expect(results[3] == .success(false))
        var found = [UInt8](repeating: 1, count: 10 << 20)
        let count = try found.withUnsafeMutableBytes {
            try Syscall.read(file, "some", into: $0, at: 0)
        }
        #expect(count == 9 << 20)
        for (block, byte) in [0, 7, 0, 0, 0, 0, 0, 0, 7].enumerated() {
            #expect(found[block << 20..<(block + 1) << 20].allSatisfy { $0 == byte })
        }
        // The whole call is refused.
        let readOnly = try Syscall.open("/dev/null", flags: O_RDONLY)
        defer { close(readOnly) }
        let none = Syscall.writeTogether(
            queue, readOnly, "none",
            [(pieces: halves, offset: 0), (pieces: halves, offset: 8 << 20)])
        #expect(none == [.success(false), .success(false)])
    }

    /// One call has writes that may bypass the page cache, and writes that may not.
    @Test func fitAndUnfitWritesTogether() async throws {
        let descriptor = try Syscall.open("/tmp", flags: O_RDWR | clinux_O_TMPFILE, mode: 0o600)
        defer { close(descriptor) }
        let bypass = PageCacheBypass(descriptor, chooser: WritePathChooser(isDirect: true))
        let joiner = WriteJoiner(descriptor: descriptor, name: "mixed", bypass: bypass)
        var buffer = try IOBuffer(byteCount: 1 << 20)
        var bytes = buffer.mutableBytes
        let memory = bytes.withUnsafeMutableBytes { $0 }
        for place in memory.indices { memory[place] = UInt8(place / 4096 % 251 + 1) }
        // Short and long ranges by turns, each with its own bytes, far from the next.
        let ranges = (0..<10).map { number in
            let start = number * 100_000 / 4096 * 4096
            return start..<start + (number % 2 == 0 ? 5000 + number : 65536)
        }
        let writes = ranges.map { range in
            PendingWrite(
                offset: Int64(range.lowerBound * 2),
                pieces: [
                    UnsafeRawBufferPointer(rebasing: UnsafeRawBufferPointer(memory)[range])
                ])
        }
        try await joiner.write(writes)
        for (range, write) in zip(ranges, writes) {
            var found = [UInt8](repeating: 0, count: range.count)
            let count = try found.withUnsafeMutableBytes {
                try Syscall.read(descriptor, "mixed", into: $0, at: write.offset)
            }
            #expect(count == range.count)
            let isThere = memory[range].elementsEqual(found)
            #expect(isThere, "\(range.count) bytes at \(write.offset)")
        }
    }

    /// One place that cannot be written is an error for all, first or last; the other is written.
    @Test(arguments: [-4096, 1 << 62] as [Int64], [false, true])
    func oneFailureIsEnough(offset: Int64, isDirect: Bool) async throws {
        let descriptor = try Syscall.open("/tmp", flags: O_RDWR | clinux_O_TMPFILE, mode: 0o600)
        defer { close(descriptor) }
        guard offset < 0 || PageCacheBypass.isPossible(descriptor) else { return }
        let bypass = PageCacheBypass(descriptor, chooser: WritePathChooser(isDirect: isDirect))
        let joiner = WriteJoiner(descriptor: descriptor, name: "half", bypass: bypass)
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

    /// Direct writes and writes through the page cache make one file.
    @Test func bothWaysWriteOneFile() async throws {
        let descriptor = try Syscall.open("/tmp", flags: O_RDWR | clinux_O_TMPFILE, mode: 0o600)
        defer { close(descriptor) }
        var bypass = PageCacheBypass(descriptor, chooser: WritePathChooser(isDirect: true))
        // Not every file system has direct writes; the file has to come out right in any case.
        if PageCacheBypass.isPossible(descriptor) {
            let direct = bypass.descriptor
            #expect(fcntl(try #require(direct), F_GETFL) & clinux_O_DIRECT != 0)
        }
        // 64 MiB: the other way is tried after a quarter.
        let joiner = WriteJoiner(descriptor: descriptor, name: "both", bypass: bypass)
        var expected: [UInt8] = []
        for number in 1..<130 {
            // Mostly whole pages, at times an end within a page, followed by whole pages at odd
            // offsets.
            let count = number % 20 == 0 ? 100_000 + number : 1 << 19
            if number % 40 == 39 {
                expected += [UInt8](repeating: 0, count: -expected.count & 4095)
            }
            var buffer = try IOBuffer.zeros(byteCount: count)
            var bytes = buffer.mutableBytes
            let memory = bytes.withUnsafeMutableBytes { $0 }
            for place in stride(from: 0, to: count, by: 1000) { memory[place] = UInt8(number) }
            // Two pieces, like clusters that are neighbours in the image but not in memory.
            let half = count / 2 & ~4095
            let pieces = [memory[..<half], memory[half...]].map {
                UnsafeRawBufferPointer(rebasing: UnsafeRawBufferPointer(memory)[$0.indices])
            }
            try await joiner.write([PendingWrite(offset: Int64(expected.count), pieces: pieces)])
            expected += memory
        }
        var found = [UInt8](repeating: 1, count: expected.count + 1)
        let count = try found.withUnsafeMutableBytes {
            try Syscall.read(descriptor, "both", into: $0, at: 0)
        }
        #expect(count == expected.count)
        #expect(found.dropLast() == expected[...])
    }

    /// A direct write would refuse some pieces, and is not worth it for others.
    @Test func onlyWholePagesAreFit() {
        func fit(_ offset: Int64, _ pieces: [(address: Int, count: Int)]) -> Bool {
            let memory = pieces.map {
                UnsafeRawBufferPointer(
                    start: UnsafeRawPointer(bitPattern: $0.address), count: $0.count)
            }
            return PageCacheBypass.isFit(memory, at: offset)
        }
        #expect(fit(8192, [(4096, 65536)]))
        #expect(fit(0, [(4096, 32768), (1 << 20, 32768)]))
        #expect(!fit(512, [(4096, 65536)]))
        #expect(!fit(0, [(4608, 65536)]))
        #expect(!fit(0, [(4096, 65536 + 512)]))
        #expect(!fit(0, [(4096, 65536), (4096, 100)]))
        #expect(!fit(0, [(4096, 61440)]))
    }
}
