import DiskImage
import ImageStorage

extension Image {
    public var layers: [any ImageLayer] { [self] }
    public var holder: (any BlockHolder)? { storage }
    public var readGranularity: Int64 { 1 }

    /// Formats whose tables leave holes in every file know better.
    public func isSparse() async throws -> Bool { storage.traits.hasHoles }

    public func read(
        _ mappings: ArraySlice<Mapping>, into buffer: inout MutableRawSpan
    ) async throws {
        let start = mappings.first?.range.lowerBound ?? 0
        var rest = mappings
        while let first = rest.first {
            if first.content == .missing { throw isMissing(first) }
            let run = Self.neighbours(rest)
            rest = rest[run.endIndex...]
            let end = run[run.endIndex - 1].range.upperBound
            var part = buffer.slice(Int(first.range.lowerBound - start)..<Int(end - start))
            if let host = first.host, first.content == .data {
                try await storage.read(into: &part, at: host.lowerBound)
            } else {
                try await readCompressed(run, into: &part)
            }
        }
    }

    /// The mappings at the front that one call can read.
    private static func neighbours(_ mappings: ArraySlice<Mapping>) -> ArraySlice<Mapping> {
        guard let first = mappings.first else { return mappings }
        guard first.content == .data else { return mappings.prefix { $0.content == .compressed } }
        var end = first.host?.lowerBound
        return mappings.prefix {
            guard $0.content == .data, $0.host?.lowerBound == end else { return false }
            end = $0.host?.upperBound
            return true
        }
    }

    private func isMissing(_ mapping: Mapping) -> ImageError {
        isMissing("data", at: mapping.host?.lowerBound ?? 0, guest: mapping.layerOffset)
    }

    /// The error for a cluster that lies behind the end of the file.
    func isMissing(_ kind: String, at host: Int64, guest: Int64) -> ImageError {
        .corrupt(
            storage.name,
            "the \(kind) cluster of guest offset \(guest.roundedDown(to: readGranularity)) at offset "
                + "\(host) lies beyond the end of the file (\(storage.size) bytes): the image is cut "
                + "short or damaged")
    }
}

// Holes under allocated clusters: the one rule, which all callers and formats follow.
extension Image {
    /// So many stretches of a file may be asked for before an answer ends: it can take long.
    private var mostAsked: Int { 64 }

    /// Looks at the file below the data that tables tell of. A cluster can be allocated and yet be
    /// a hole of the file, or lie behind its end: the image was preallocated, or cut short.
    ///
    /// - Parameters:
    ///   - found: front to back.
    ///   - clusterSize: in bytes. A file may end within its last cluster: the rest is zeros.
    /// - Returns: the same stretches, in more pieces, but not necessarily all of them.
    func settled(
        _ found: [Mapping], clusterSize: Int64, _ holes: HoleSearch
    ) async throws -> [Mapping] {
        if holes == .asQemu, try await !isPreallocated() { return found }
        let size = storage.size
        // Without holes only the end of the file is to be looked at.
        if !storage.traits.hasHoles, found.allSatisfy({ $0.isWithin(size) }) { return found }
        var result: [Mapping] = []
        var asked = 0
        for mapping in found {
            var position = mapping.range.lowerBound
            while position < mapping.range.upperBound {
                let rest = mapping.clipped(to: position..<mapping.range.upperBound)
                if rest.content == .data, let host = rest.host {
                    if asked == mostAsked { return result }
                    asked += 1
                    let piece = try await piece(at: host, clusterSize: clusterSize)
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

    /// The piece of the file that a stretch of allocated clusters begins with.
    private func piece(
        at host: Range<Int64>, clusterSize: Int64
    ) async throws -> (count: Int64, content: Mapping.Content) {
        let (start, size) = (host.lowerBound, storage.size)
        guard start < size else {
            let cluster = start.roundedDown(to: clusterSize)
            return cluster < size
                ? (min(Int64(host.count), cluster + clusterSize - start), .preallocated)
                : (Int64(host.count), .missing)
        }
        let extent = try await storage.extent(at: start, limit: min(host.upperBound, size))
        return (Int64(extent.range.count), extent.isHole ? .preallocated : .data)
    }
}

extension Mapping {
    /// Whether all of the data lies before an offset of the file.
    fileprivate func isWithin(_ size: Int64) -> Bool {
        content != .data || host.map { $0.upperBound <= size } ?? true
    }
}
