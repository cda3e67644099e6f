import DiskImage

/// The second and third stage in one, where nothing has to be read: lets the target take over the
/// blocks that hold the source's bytes, and says what has to be copied after all, like any other
/// data.
struct ShareStage: Sendable {
    /// The source of the chunks' mappings.
    let extents: any ImageSource
    let target: any ImageTarget

    /// - Returns: what could not be shared, front to back.
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
