import Concurrency
import DiskImage

/// Turns the data of whole clusters or subclusters into the form in which a qcow2 image stores
/// them: finds those that hold zeros, and compresses the others where that makes them smaller.
struct Qcow2ClusterEncoder: Sendable {
    private let unit: Int
    private let keepsZeros: Bool
    private let zerosFrom: Int64
    /// nil if clusters are not compressed.
    private let compressors: ResourcePool<Qcow2Compressor>?

    /// - Parameters:
    ///   - unit: length in bytes of a cluster, or of a subcluster if these are neither preallocated
    ///     nor compressed.
    ///   - keepsZeros: whether zeros are stored like data.
    ///   - zerosFrom: guest offset in bytes from which on the image can hold zeros that are not
    ///     stored.
    ///   - compression: nil leaves clusters as they are.
    ///   - level: nil is the library's default.
    init(
        unit: Int64, keepsZeros: Bool, zerosFrom: Int64, compression: Qcow2Compression?,
        level: Int? = nil
    ) {
        self.unit = Int(unit)
        self.keepsZeros = keepsZeros
        self.zerosFrom = zerosFrom
        compressors = compression.map { compression in
            ResourcePool { () throws(ImageError) in
                try Qcow2Compressor(compression, level: level, clusterSize: unit)
            }
        }
    }

    /// Encodes whole units; see `ImageTarget.encode`. Behind the end of the disk, the buffer
    /// holds the rest of the last cluster.
    func encode(
        _ data: RawSpan, _ positions: Range<Int>, at guestOffset: Int64,
        into encoded: inout MutableRawSpan, used: inout Int
    ) throws(ImageError) -> [EncodedPiece] {
        let compressor = try compressors?.take()
        defer { if let compressor { compressors?.giveBack(compressor) } }
        var pieces: [EncodedPiece] = []
        for start in stride(from: positions.lowerBound, to: positions.upperBound, by: unit) {
            let cluster = start..<start + unit
            let guest = guestOffset + Int64(start - positions.lowerBound)
            let form = try form(
                of: cluster, at: guest, in: data, compressor, into: &encoded, used: &used)
            Self.append(form, guest..<guest + Int64(unit), to: &pieces)
        }
        return pieces
    }

    private func form(
        of cluster: Range<Int>, at guest: Int64, in data: RawSpan, _ compressor: Qcow2Compressor?,
        into encoded: inout MutableRawSpan, used: inout Int
    ) throws(ImageError) -> EncodedPiece.Form {
        if !keepsZeros, guest >= zerosFrom, ZeroScan.isZero(data, cluster) { return .zero }
        guard let compressor else { return .plain(cluster) }
        // A stream as long as the cluster would save nothing, and the format requires shorter ones.
        var room = encoded.slice(used..<used + cluster.count - 1)
        guard let length = try compressor.compress(data.extracting(cluster), into: &room) else {
            return .plain(cluster)
        }
        let positions = used..<used + length
        used += length
        return .compressed(positions)
    }

    /// Adds a cluster to the pieces, joined to its neighbour if both have the same form. A
    /// compressed cluster stays alone, because it gets an entry of its own.
    private static func append(
        _ form: EncodedPiece.Form, _ guestRange: Range<Int64>, to pieces: inout [EncodedPiece]
    ) {
        let joined: EncodedPiece.Form
        switch (pieces.last?.form, form) {
        case (.zero, .zero): joined = .zero
        case (.plain(let before), .plain(let next)):
            joined = .plain(before.lowerBound..<next.upperBound)
        default: return pieces.append(EncodedPiece(guestRange: guestRange, form: form))
        }
        let start = pieces[pieces.count - 1].guestRange.lowerBound
        pieces[pieces.count - 1] = EncodedPiece(
            guestRange: start..<guestRange.upperBound, form: joined)
    }
}
