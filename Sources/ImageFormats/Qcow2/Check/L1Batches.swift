import Concurrency

/// The entries of an L1 table that are not zero, in batches. Batches grow from a single entry on;
/// while reads wait, each has a single entry.
struct L1Batches: Sequence, IteratorProtocol {
    private let entries: [UInt64]
    private let tablesPerBatch: Int
    private let meter: CallMeter
    private var position = 0
    private var size = 1

    init(_ entries: [UInt64], tablesPerBatch: Int, meter: CallMeter) {
        self.entries = entries
        self.tablesPerBatch = tablesPerBatch
        self.meter = meter
    }

    mutating func next() -> [UInt64]? {
        let size = meter.isWaiting ? 1 : size
        self.size = Swift.min(2 * self.size, tablesPerBatch)
        var batch: [UInt64] = []
        while position < entries.count, batch.count < size {
            if entries[position] != 0 { batch.append(entries[position]) }
            position += 1
        }
        return batch.isEmpty ? nil : batch
    }
}
