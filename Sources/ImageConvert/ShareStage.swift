import DiskImage

/// The second and third stage of a chunk that is not read: lets the target take over the blocks
/// that hold the source's bytes.
struct ShareStage: Sendable {
    /// The source of the chunks' mappings.
    let extents: any ImageSource
    let target: any ImageTarget

    /// - Returns: the mappings that could not be shared, in guest order.
    func share(_ chunk: Chunk) -> [Mapping] {
        let layers = extents.layers
        return chunk.mappings.compactMap { mapping in
            guard target.sharesUnread, let host = mapping.host,
                let holder = layers[mapping.layer].holder
            else { return mapping }
            let start = mapping.range.lowerBound
            let rest = start + target.share(host, of: holder, at: start)..<mapping.range.upperBound
            return rest.isEmpty ? nil : mapping.clipped(to: rest)
        }
    }
}
