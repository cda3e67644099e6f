import DiskImage
import ImageStorage

/// A piece of the file under a run of allocated clusters: the one rule for holes below clusters,
/// which `convert`, `map`, `compare -s` and `measure` all follow.
///
/// A cluster can be allocated and yet be a hole of the file, or lie behind its end: the image was
/// preallocated, or cut short.
struct HostPiece: Equatable {
    enum Content {
        case data
        /// Reads as zeros: the file has no blocks here, or ends within this cluster.
        case hole
        /// The cluster lies wholly behind the end of the file: zeros to qemu, an error to a reader
        /// here, because no way of making images leaves such a cluster.
        case missing
    }

    /// In bytes.
    var count: Int64
    var content: Content

    /// The piece at a place behind the end of the file; nil for a place within it, where the
    /// storage has to be asked.
    ///
    /// - Parameters:
    ///   - host: in bytes from the start of the file.
    ///   - count: of the run, in bytes.
    ///   - size: of the file, in bytes.
    init?(at host: Int64, count: Int64, behindEnd size: Int64, clusterSize: Int64) {
        guard host >= size else { return nil }
        let cluster = host.roundedDown(to: clusterSize)
        content = cluster < size ? .hole : .missing
        self.count = cluster < size ? min(count, cluster + clusterSize - host) : count
    }

    /// The piece that a storage has told of.
    init(_ found: Extent) {
        count = Int64(found.range.count)
        content = found.content == .zero ? .hole : .data
    }
}

extension Qcow2Source {
    /// The piece of the file that a run of allocated clusters begins with.
    func hostPiece(at host: HostOffset, count: Int64) async throws -> HostPiece {
        let behind = HostPiece(
            at: host.bytes, count: count, behindEnd: storage.size, clusterSize: readGranularity)
        if let behind { return behind }
        return HostPiece(
            try await storage.extent(
                at: host.bytes, limit: min(host.bytes + count, storage.size)))
    }
}
