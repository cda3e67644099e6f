import Concurrency
import DiskImage
import ImageStorage
import Synchronization

/// The position of the next cell to compare and the first finding, shared by all workers.
final class ComparisonCursor: Sendable {
    typealias Finding = Result<Comparison.Difference, Comparison.Failure>

    private struct State {
        var position: Int64 = 0
        var isSkipping = false
        var found: (offset: Int64, finding: Finding)?
    }

    let end: Int64
    private let state = Mutex(State())
    /// Atomic because it is read before each piece, where the lock would cost too much.
    private let foundOffset = Atomic<Int64>(.max)

    /// - Parameter end: the end of the disk, in bytes.
    init(end: Int64) { self.end = end }

    /// The finding with the lowest offset so far.
    var finding: Finding? { state.withLock { $0.found?.finding } }

    /// The guest offset in bytes at which comparing can stop.
    var limit: Int64 { min(end, foundOffset.load(ordering: .relaxed)) }

    /// - Parameter size: the size of a cell in bytes; cells end at its multiples.
    /// - Returns: nil if nothing is left to compare.
    func takeCell(_ size: Int64) -> Range<Int64>? {
        state.withLock {
            let start = $0.position
            guard start < $0.found?.offset ?? end else { return nil }
            $0.position = end - start > size ? (start + 1).roundedUp(to: size) : end
            return start..<$0.position
        }
    }

    /// Lets one worker at a time look ahead for zeros; a second one would find the same zeros.
    func beginSkipping() -> Bool {
        state.withLock {
            let isFree = !$0.isSkipping
            $0.isSkipping = true
            return isFree
        }
    }

    /// Moves the position to `offset`: everything before it is known to be equal.
    func skip(to offset: Int64) {
        state.withLock { $0.position = max($0.position, offset) }
    }

    func endSkipping() { state.withLock { $0.isSkipping = false } }

    func found(_ finding: Finding, at offset: Int64) {
        state.withLock {
            if let known = $0.found, known.offset <= offset { return }
            $0.found = (offset, finding)
            foundOffset.store(offset, ordering: .relaxed)
        }
    }
}

/// Compares one cell after another in chunks of the size that the window chooses.
struct ComparisonWorker: Sendable {
    let pair: ImagePair
    let cursor: ComparisonCursor
    let window: WindowGate
    let progress: ProgressMark

    func run() async throws {
        var first = try IOBuffer(byteCount: 0)
        var second = try IOBuffer(byteCount: 0)
        while true {
            var pass = await window.enter()
            guard let cell = cursor.takeCell(pass.chunkSize) else { return }
            try Task.checkCancellation()
            if first.byteCount < pass.chunkSize {
                first = try IOBuffer(byteCount: Int(pass.chunkSize))
                second = try IOBuffer(byteCount: Int(pass.chunkSize))
            }
            let isZero = try await compare(cell, &first, &second)
            pass.noteRead(bytes: Int64(cell.count))
            progress.reach(cell.upperBound)
            if isZero { try await skipZeros(from: cell.upperBound, step: pass.chunkSize) }
        }
    }

    /// - Returns: whether metadata shows that the whole cell is zero in both images.
    private func compare(
        _ cell: Range<Int64>, _ first: inout IOBuffer, _ second: inout IOBuffer
    ) async throws -> Bool {
        var isZero = true
        var walk = pair.walk()
        var position = cell.lowerBound
        while position < min(cell.upperBound, cursor.limit) {
            guard let step = try await step(&walk, at: position, limit: cell.upperBound) else {
                return false
            }
            if step.work == .statusDiffers {
                cursor.found(.success(.blockStatus(at: position)), at: position)
                return false
            }
            if step.work != .nothing {
                isZero = false
                guard try await compare(step, &first, &second) else { return false }
            }
            position = step.range.upperBound
        }
        return isZero
    }

    private func step(
        _ walk: inout ImagePair.Walk, at offset: Int64, limit: Int64
    ) async throws -> ImagePair.Walk.Step? {
        do {
            return try await walk.step(at: offset, limit: limit)
        } catch let error as ImageError {
            cursor.found(.failure(Comparison.Failure(.blockStatus, error)), at: offset)
            return nil
        }
    }

    /// - Returns: false if this cell needs no further comparing.
    private func compare(
        _ step: ImagePair.Walk.Step, _ first: inout IOBuffer, _ second: inout IOBuffer
    ) async throws -> Bool {
        let start = step.range.lowerBound
        do {
            let found = try await firstDifference(in: step, &first, &second)
            guard let found else { return true }
            let offset = start + Int64(found)
            cursor.found(.success(.content(at: offset)), at: offset)
        } catch let error as ImageError {
            cursor.found(.failure(Comparison.Failure(.reading, error)), at: start)
        }
        return false
    }

    private func firstDifference(
        in step: ImagePair.Walk.Step, _ first: inout IOBuffer, _ second: inout IOBuffer
    ) async throws -> Int? {
        let range = step.range
        if step.work != .readSecond {
            try await Self.read(range, step.first, of: pair.first, into: &first)
        }
        if step.work != .readFirst {
            try await Self.read(range, step.second, of: pair.second, into: &second)
        }
        let one = first.bytes.extracting(0..<range.count)
        let other = second.bytes.extracting(0..<range.count)
        return switch step.work {
        case .readFirst: ByteComparison.firstNonzero(one)
        case .readSecond: ByteComparison.firstNonzero(other)
        default: ByteComparison.firstDifference(one, other)
        }
    }

    private static func read(
        _ range: Range<Int64>, _ mappings: [Mapping], of source: any ImageSource,
        into buffer: inout IOBuffer
    ) async throws {
        var all = buffer.mutableBytes
        var part = all.slice(0..<range.count)
        if mappings.isEmpty {
            try await source.read(into: &part, at: range.lowerBound)
        } else {
            try await source.read(mappings[...], into: &part)
        }
    }

    /// Moves the cursor past the zeros that follow, doubling the distance with each step: a
    /// terabyte of zeros takes a moment, and little work is wasted if zeros and data alternate.
    private func skipZeros(from start: Int64, step: Int64) async throws {
        guard cursor.beginSkipping() else { return }
        defer { cursor.endSkipping() }
        var walk = pair.walk()
        var position = start
        var reach = step
        while position < cursor.limit {
            let limit = cursor.end - position > reach ? position + reach : cursor.end
            // The worker that compares this cell will meet the error and report it.
            guard let step = try? await walk.step(at: position, limit: limit),
                step.work == .nothing
            else { return }
            position = step.range.upperBound
            cursor.skip(to: position)
            if position == limit, reach < 1 << 50 { reach *= 2 }
            try Task.checkCancellation()
        }
    }
}
