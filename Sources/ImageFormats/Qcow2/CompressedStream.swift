import DiskImage

/// Gathers compressed clusters in the order of their places, and hands them out as long runs.
///
/// A compressed cluster ends anywhere, and the next one begins there. Written one by one, they
/// would be short and share pages, and each would be a system call.
struct CompressedStream: ~Copyable {
    /// Length of a run in bytes. With half of it, compressing takes 4 to 11 % more time; a third
    /// more gains little and costs memory, because there are as many runs as chunks in flight.
    static let runSize = 192 << 10

    /// Runs end at a multiple of this number of bytes. The padding overwrites nothing: the layout
    /// leaves a cluster only when it will not come back, so the rest behind the last stream is
    /// unused.
    private let unit: Int
    /// Length of a run in bytes, a multiple of the unit.
    private let capacity: Int
    private var openRun: CompressedRun?
    private var spare: [CompressedRun] = []

    /// - Parameter blockSize: best unit of writes to the storage, in bytes.
    init(clusterSize: Int64, blockSize: Int64 = 1) {
        unit = Int(min(clusterSize, max(Int64(IOBuffer.alignment), blockSize)))
        capacity = Int(Int64(Self.runSize).roundedUp(to: Int64(unit)))
    }

    /// Adds bytes to the open run. A run that is full, or that the bytes do not continue, is added
    /// to the placement.
    mutating func append(
        _ bytes: RawSpan, at hostOffset: Int64, to placement: inout Placement
    ) throws(ImageError) {
        if let openRun, openRun.end != hostOffset { close(&placement) }
        var done = 0
        while done < bytes.byteCount {
            let run: CompressedRun
            if let openRun { run = openRun } else { run = try begin(at: hostOffset + Int64(done)) }
            done += run.append(bytes.extracting(done..<bytes.byteCount))
            if run.isFull { close(&placement) }
        }
    }

    private mutating func begin(at hostOffset: Int64) throws(ImageError) -> CompressedRun {
        let run: CompressedRun
        if let known = spare.popLast() {
            run = known
        } else {
            run = try CompressedRun(capacity: capacity)
        }
        run.begin(at: hostOffset)
        openRun = run
        return run
    }

    /// Adds the open run, if there is one, to the placement, padded to a multiple of `unit`.
    mutating func close(_ placement: inout Placement) {
        guard let run = openRun else { return }
        run.pad(to: unit)
        openRun = nil
        // One chunk can close many short runs, which must not hold the memory of long ones until
        // they are written.
        if run.count < capacity / 4, let short = try? run.trimmed() {
            placement.append(.compressed(short), at: run.hostOffset)
            spare.append(run)
        } else {
            placement.append(.compressed(run), at: run.hostOffset)
        }
    }

    /// Takes back a run that has been written.
    mutating func reuse(_ run: CompressedRun) {
        if run.capacity == capacity { spare.append(run) }
    }
}
