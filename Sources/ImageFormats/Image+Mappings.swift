import DiskImage
import ImageStorage

extension Image {
    public var layers: [any ImageLayer] { [self] }
    public var holder: (any BlockHolder)? { dataStorage }
    public var readGranularity: Int64 { 1 }

    /// Whether the storage has holes. A format whose tables leave holes in every file has its own
    /// rule.
    public func isSparse() async throws -> Bool { dataStorage.traits.hasHoles }

    public func read(
        _ mappings: ArraySlice<Mapping>, into buffer: inout MutableRawSpan
    ) async throws {
        let start = mappings.first?.range.lowerBound ?? 0
        var rest = mappings
        while let first = rest.first {
            if first.content == .missing { throw missingCluster(first) }
            let run = Self.neighbours(rest)
            rest = rest[run.endIndex...]
            let end = run[run.endIndex - 1].range.upperBound
            var part = buffer.slice(Int(first.range.lowerBound - start)..<Int(end - start))
            if let host = first.host, first.content == .data {
                try await dataStorage.read(into: &part, at: host.lowerBound)
            } else if first.content == .encrypted {
                var whole = first
                whole.range = first.range.lowerBound..<end
                try await readEncrypted(whole, into: &part)
            } else {
                try await readCompressed(run, into: &part)
            }
        }
    }

    /// Returns the mappings at the front that one call can read.
    private static func neighbours(_ mappings: ArraySlice<Mapping>) -> ArraySlice<Mapping> {
        guard let first = mappings.first else { return mappings }
        if first.content == .compressed { return mappings.prefix { $0.content == .compressed } }
        var end = first.host?.lowerBound
        return mappings.prefix {
            guard $0.content == first.content, $0.host?.lowerBound == end else { return false }
            end = $0.host?.upperBound
            return true
        }
    }

    private func missingCluster(_ mapping: Mapping) -> ImageError {
        let host = mapping.host?.lowerBound ?? 0
        return missingCluster(
            "data", at: host - mapping.layerOffset % readGranularity, guest: mapping.layerOffset)
    }

    /// The error for a cluster that lies behind the end of the file.
    func missingCluster(_ kind: String, at host: Int64, guest: Int64) -> ImageError {
        let cluster = guest.roundedDown(to: readGranularity)
        return .corrupt(
            dataStorage.name,
            "the \(kind) cluster of guest offset \(cluster) at offset \(host) lies beyond the end "
                + "of the file (\(dataStorage.size) bytes): the image is cut short or damaged")
    }
}

// The one rule for holes under allocated clusters, which all callers and formats follow.
extension Image {
    /// Largest number of file extents asked for per answer, because asking can take long.
    private var mostAsked: Int { 64 }

    /// Corrects the data mappings of tables by what the file holds there. An allocated cluster can
    /// be a hole of the file or lie behind its end, because the image was preallocated or cut
    /// short.
    ///
    /// - Parameters:
    ///   - found: mappings from the tables, front to back.
    ///   - clusterSize: in bytes. A file may end within its last cluster, whose rest then reads as
    ///     zeros.
    /// - Returns: the same stretches in more pieces, but not necessarily all of them.
    func settled(
        _ found: [Mapping], clusterSize: Int64, _ holes: HoleSearch
    ) async throws -> [Mapping] {
        if holes == .asQemu, try await !isPreallocated() { return found }
        let size = dataStorage.size
        // Without holes, only the end of the file makes a difference.
        if !dataStorage.traits.hasHoles, found.allSatisfy({ $0.isWithin(size) }) { return found }
        var result: [Mapping] = []
        var asked = 0
        for mapping in found {
            var position = mapping.range.lowerBound
            while position < mapping.range.upperBound {
                let rest = mapping.clipped(to: position..<mapping.range.upperBound)
                if rest.content == .data, let host = rest.host {
                    if asked == mostAsked { return result }
                    asked += 1
                    let piece = try await piece(
                        at: host, cluster: host.lowerBound - rest.layerOffset % clusterSize,
                        clusterSize: clusterSize)
                    var part = rest.clipped(to: position..<position + piece.count)
                    part.content = piece.content
                    result.append(part)
                } else {
                    result.append(rest)
                }
                position = result[result.count - 1].range.upperBound
            }
        }
        return result
    }

    /// Returns length and content of the first piece of the file under a stretch of allocated
    /// clusters.
    ///
    /// - Parameter cluster: offset in the file of the cluster in which the stretch begins, in
    ///   bytes; not a multiple of its size in every format.
    private func piece(
        at host: Range<Int64>, cluster: Int64, clusterSize: Int64
    ) async throws -> (count: Int64, content: Mapping.Content) {
        let (start, size) = (host.lowerBound, dataStorage.size)
        guard start < size else {
            return cluster < size
                ? (min(Int64(host.count), cluster + clusterSize - start), .preallocated)
                : (Int64(host.count), .missing)
        }
        let extent = try await dataStorage.extent(at: start, limit: min(host.upperBound, size))
        return (Int64(extent.range.count), extent.isHole ? .preallocated : .data)
    }
}

extension Mapping {
    /// Whether all of its data lies before an offset of the file.
    fileprivate func isWithin(_ size: Int64) -> Bool {
        content != .data || host.map { $0.upperBound <= size } ?? true
    }
}
