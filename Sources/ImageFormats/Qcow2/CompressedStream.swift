import DiskImage

/// Gathers compressed clusters in the order of their places, and hands them out as long runs.
///
/// A compressed cluster ends anywhere, and the next one begins there. Written one by one they would be short and share
/// pages: no way past the page cache, and a system call for each.
struct CompressedStream {
    /// Half of a chunk of plain data: twice that gained nothing and cost memory. In bytes.
    private static let runSize = 256 << 10

    /// What lies behind the last stream in its cluster belongs to nobody.
    private let padding: Int
    private var open: CompressedRun?
    private var spare: [CompressedRun] = []

    init(clusterSize: Int) { padding = min(clusterSize, IOBuffer.alignment) }

    /// Takes bytes along. A run that is full, or that they do not continue, is added to the placement.
    mutating func append(_ bytes: RawSpan, at hostOffset: Int64, to placement: inout Placement) {
        if let open, open.end != hostOffset { close(&placement) }
        var done = 0
        while done < bytes.byteCount {
            let run = open ?? begin(at: hostOffset + Int64(done))
            done += run.append(bytes.extracting(done..<bytes.byteCount))
            if run.isFull { close(&placement) }
        }
    }

    private mutating func begin(at hostOffset: Int64) -> CompressedRun {
        let run = spare.popLast() ?? CompressedRun(capacity: Self.runSize)
        run.begin(at: hostOffset)
        open = run
        return run
    }

    /// Hands out the open run, if there is one, as whole pages.
    mutating func close(_ placement: inout Placement) {
        guard let run = open else { return }
        run.pad(to: padding)
        placement.append(.compressed(run), at: run.hostOffset)
        open = nil
    }

    mutating func reuse(_ run: CompressedRun) { spare.append(run) }
}
