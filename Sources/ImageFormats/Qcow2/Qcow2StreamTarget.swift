import Concurrency
import DiskImage
import ImageStorage

/// A new qcow2 image that is written from front to back, into a pipe.
///
/// The plan of the disk tells which clusters will be stored, so all tables are known before the
/// first byte of data:
///
///     header | refcount table | refcount blocks | L1 | L2 tables | data, in guest order
///
/// Every planned cluster is stored, also if it turns out to hold zeros.
final class Qcow2StreamTarget: PlannedTarget {
    let traits: TargetTraits
    let compresses = false
    private let storage: any WritableStorage
    private let options: Qcow2Options
    private let geometry: Qcow2Geometry
    private let encoder: Qcow2ClusterEncoder
    private let places = Exclusive(DataPlaces())

    /// - Throws: `ImageError` if options contradict each other or the size, or need more than one
    ///   pass.
    init(
        _ storage: any WritableStorage, virtualSize: Int64, _ options: Qcow2Options,
        _ settings: TargetSettings
    ) throws(ImageError) {
        guard !settings.compress, options.preallocation == .off, options.dataFile == nil else {
            throw .unsupported(
                storage.name,
                "a qcow2 image that is compressed, preallocated or has a data file cannot be "
                    + "written to a pipe, because what its tables say is only known at the end")
        }
        self.storage = storage
        self.options = options
        geometry = try options.geometry(virtualSize: virtualSize)
        traits = TargetTraits(
            granularity: geometry.clusterSize,
            readsAsZeroFrom: options.backing?.virtualSize ?? 0, hasBacking: options.backing != nil,
            canWriteZeroes: options.version >= 3, placesInOrder: true)
        encoder = Qcow2ClusterEncoder(
            unit: geometry.clusterSize, keepsZeros: true, zerosFrom: 0, compression: nil)
    }

    // MARK: Tables

    func begin(_ plan: DiskPlan) async throws {
        let layout = Layout(plan, geometry, refcountBits: options.refcountBits)
        guard layout.tableClusters * geometry.clusterSize <= Qcow2Layout.maximumRefcountTable else {
            throw ImageError.invalid(
                "the image grows too large for clusters of \(geometry.clusterSize) bytes")
        }
        var position: Int64 = 0
        func write(_ bytes: [UInt8], upTo end: Int64) async throws {
            var bytes = bytes
            bytes.appendZeros(upTo: Int(end - position))
            try await storage.writeBytes(bytes, at: position)
            position = end
        }
        let clusterSize = geometry.clusterSize
        try await write(try header(layout).serialized(), upTo: clusterSize)
        let blocks = (0..<layout.blocks).map {
            UInt64((1 + layout.tableClusters + $0) * clusterSize)
        }
        try await write(blocks.bigEndianBytes, upTo: (1 + layout.tableClusters) * clusterSize)
        for index in 0..<layout.blocks {
            try await write(layout.block(index).bytes, upTo: position + clusterSize)
        }
        try MemoryMargin.check(for: 2 * 8 * Int(geometry.l1Entries))
        var l1 = [UInt64](repeating: 0, count: Int(geometry.l1Entries))
        for (number, index) in layout.tables.enumerated() {
            l1[Int(index)] =
                UInt64((layout.firstTable + Int64(number)) * clusterSize) | Qcow2Entry.copied
        }
        try await write(l1.bigEndianBytes, upTo: layout.firstTable * clusterSize)
        var rest = plan.ranges[...]
        var host = layout.firstData * clusterSize
        for index in layout.tables {
            let words = table(index, &rest, &host)
            try await write(words.bigEndianBytes, upTo: position + clusterSize)
        }
        try await places.use {
            $0 = DataPlaces(plan, from: layout.firstData * clusterSize)
        }
    }

    private func header(_ layout: Layout) -> Qcow2Header {
        var header = Qcow2Header(options, geometry)
        header.refcountTableOffset = HostOffset(geometry.clusterSize)
        header.refcountTableClusters = layout.tableClusters
        header.l1Offset = HostOffset(layout.firstL1 * geometry.clusterSize)
        return header
    }

    /// Makes an L2 table.
    ///
    /// - Parameters:
    ///   - rest: the ranges of the plan from this table on; those that end in it are removed.
    ///   - host: offset in bytes of the next data cluster.
    private func table(
        _ index: Int64, _ rest: inout ArraySlice<DiskPlan.Range>, _ host: inout Int64
    ) -> [UInt64] {
        var words = [UInt64](repeating: 0, count: Int(geometry.clusterSize / 8))
        let end = (index + 1) * geometry.l2Coverage
        while let range = rest.first, range.guest.lowerBound < end {
            let part = range.guest.clamped(to: index * geometry.l2Coverage..<end)
            for guest in stride(
                from: part.lowerBound, to: part.upperBound, by: Int64.Stride(geometry.clusterSize))
            {
                let word = Int(
                    guest % geometry.l2Coverage / geometry.clusterSize * geometry.wordsPerL2Entry)
                if range.isStored {
                    words[word] = UInt64(host) | Qcow2Entry.copied
                    host += geometry.clusterSize
                } else if !geometry.hasExtendedL2 {
                    words[word] = Qcow2Entry.zero
                }
                if geometry.hasExtendedL2 {
                    words[word + 1] =
                        range.isStored
                        ? Qcow2Entry.allSubclustersAllocated : Qcow2Entry.allSubclustersZero
                }
            }
            guard range.guest.upperBound <= end else { break }
            rest.removeFirst()
        }
        return words
    }

    // MARK: Data

    func encode(
        _ data: RawSpan, positions: Range<Int>, at guestOffset: Int64,
        into encoded: inout MutableRawSpan, used: inout Int
    ) throws -> [EncodedPiece] {
        try encoder.encode(data, positions, at: guestOffset, into: &encoded, used: &used)
    }

    func place(_ pieces: [EncodedPiece], encoded: RawSpan) async throws -> Placement {
        try await places.use { places in
            var placement = Placement()
            for piece in pieces {
                guard case .plain(let positions) = piece.form else { continue }
                guard let host = places.take(piece.guestRange) else { throw self.changed }
                placement.append(.plain(positions), at: host)
            }
            return placement
        }
    }

    private var changed: ImageError {
        .corrupt(storage.name, "the source has changed since its tables were written")
    }

    func write(
        _ placement: Placement, data: RawSpan, origin: BufferOrigin
    ) async throws {
        try await storage.writePlacement(placement, data: data)
    }

    func finish(virtualSize: Int64) async throws {
        guard try await places.use({ $0.isComplete }) else { throw changed }
        try await storage.flush()
    }
}

extension Qcow2StreamTarget {
    /// Numbers of clusters, and the index of the first of each kind.
    private struct Layout {
        /// Indices of the L2 tables.
        var tables: [Int64] = []
        var tableClusters: Int64 = 0
        var blocks: Int64 = 0
        private var end: Int64 = 0
        private let refcountBits: Int
        private let clusterSize: Int64
        private let l1Clusters: Int64

        var firstL1: Int64 { 1 + tableClusters + blocks }
        var firstTable: Int64 { firstL1 + l1Clusters }
        var firstData: Int64 { firstTable + Int64(tables.count) }

        init(_ plan: DiskPlan, _ geometry: Qcow2Geometry, refcountBits: Int) {
            self.refcountBits = refcountBits
            clusterSize = geometry.clusterSize
            l1Clusters = (geometry.l1Entries * 8).dividedUp(by: clusterSize)
            var data: Int64 = 0
            for range in plan.ranges {
                let last = (range.guest.upperBound - 1) / geometry.l2Coverage
                let first = range.guest.lowerBound / geometry.l2Coverage
                for index in first...last where tables.last.map({ $0 < index }) ?? true {
                    tables.append(index)
                }
                if range.isStored { data += Int64(range.guest.count).dividedUp(by: clusterSize) }
            }
            let others = 1 + l1Clusters + Int64(tables.count) + data
            let size = RefcountMetadataSize(
                counting: others, clusterSize: clusterSize, refcountBits: refcountBits)
            tableClusters = size.tableClusters
            blocks = size.blocks
            end = others + size.total
        }

        /// A refcount block: every cluster of the file has one reference.
        func block(_ number: Int64) -> RefcountBlock {
            RefcountBlock(
                bits: refcountBits, byteCount: Int(clusterSize), number: number, ofImageWith: end)
        }
    }

    /// The places of the data, which comes in guest order.
    private struct DataPlaces: Sendable {
        private var planned: [DiskPlan.Range] = []
        /// The range that comes next, and the number of its bytes that have come.
        private var next = 0
        private var done: Int64 = 0
        private var host: Int64 = 0

        init() {}

        /// - Parameter host: offset in bytes of the first data cluster.
        init(_ plan: DiskPlan, from host: Int64) {
            planned = plan.ranges.filter(\.isStored)
            self.host = host
        }

        var isComplete: Bool { next == planned.count }

        /// - Returns: the place of data in bytes; nil if it was not planned, or not next.
        mutating func take(_ guest: Range<Int64>) -> Int64? {
            guard next < planned.count, case let range = planned[next].guest,
                guest.lowerBound == range.lowerBound + done, guest.upperBound <= range.upperBound
            else { return nil }
            done += Int64(guest.count)
            if guest.upperBound == range.upperBound {
                next += 1
                done = 0
            }
            defer { host += Int64(guest.count) }
            return host
        }
    }
}
