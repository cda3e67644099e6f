import DiskImage
import ImageFormats
import ImageStorage

/// An existing qcow2 image that a conversion writes into (`-n`).
///
/// What the conversion does not write is to stay as it was. So the image is rebuilt, with the properties of
/// the old one, from both: exact tables, no leftovers, and as with every target the old image stands until
/// the new one is whole. What a rebuilt image would lose is refused.
struct ExistingQcow2 {
    let options: Qcow2Options
    /// It holds nothing yet: there is nothing to keep.
    private let isEmpty: Bool
    private let image: OpenedImage

    /// - Parameter name: of the target.
    static func open(_ name: ImageName, _ opener: ImageOpener) async throws -> ExistingQcow2 {
        var opener = opener
        // The target's own lock is taken when it is opened for writing.
        opener.shareForced = true
        let image = try await opener.open(name, format: .qcow2)
        guard let header = (image.topLayer as? Qcow2Source)?.header else {
            throw ImageError.unsupported(name.description, "is not a qcow2 image")
        }
        if let reason = header.reasonNotToRebuild {
            throw ImageError.unsupported(
                name.description, "cannot write into an image with \(reason) (-n)")
        }
        var options = Qcow2Options()
        options.version = header.version
        options.clusterSize = header.geometry.clusterSize
        options.compression = header.compression
        options.lazyRefcounts = header.hasLazyRefcounts
        if let file = header.backingFile {
            options.backing = Qcow2Options.Backing(
                file: file, format: header.backingFormat,
                virtualSize: image.backing?.virtualSize ?? 0)
        }
        return ExistingQcow2(
            options: options, isEmpty: try await isEmpty(image.topLayer), image: image)
    }

    private static func isEmpty(_ layer: any ImageSource) async throws -> Bool {
        guard layer.virtualSize > 0 else { return true }
        let extent = try await layer.extent(at: 0, limit: layer.virtualSize)
        return extent.content == .backing && extent.range.upperBound == layer.virtualSize
    }

    /// What the rebuilt image is to hold after `input` was written into it.
    ///
    /// - Parameter leavesBacking: the input leaves out what the backing file provides (`-B`): there the
    ///   old image shows through.
    func under(_ input: CopyInput, leavesBacking: Bool, path: ImageName) throws -> CopyInput {
        let size = image.source.virtualSize
        let written = input.content.virtualSize
        guard size >= written else {
            throw ImageError(
                .invalid, path: path.description,
                "is smaller (\(size) bytes) than the source (\(written) bytes)")
        }
        var input = input
        if leavesBacking {
            guard options.backing != nil else {
                throw ImageError(.invalid, path: path.description, "has no backing file (-B)")
            }
            input.content = LayeredSource(layers: [input.extents, image.source])
            input.extents = LayeredSource(
                layers: [input.extents, image.topLayer],
                sizeBelow: image.backing?.virtualSize ?? 0)
        }
        guard size > written else { return input }
        input.content = try ConcatenatedSource([
            input.content, SliceSource(image.source, written..<size),
        ])
        input.extents = try ConcatenatedSource([
            input.extents,
            SliceSource(leavesBacking ? image.ownLayer : image.source, written..<size),
        ])
        return input
    }

    /// Whether the old image has to be read while the new one is written.
    func isNeeded(under input: CopyInput, leavesBacking: Bool) -> Bool {
        !isEmpty && (leavesBacking || image.source.virtualSize > input.content.virtualSize)
    }

    /// The files below the image: they are read while it is written.
    var filesBelow: [FileIdentity] { Array(image.files.dropFirst()) }
}

/// What a pipeline copies: where it reads, and whose extents decide what is copied at all.
struct CopyInput {
    var content: any ImageSource
    var extents: any ImageSource

    /// The same with zeros behind it, up to a size in bytes.
    func padded(to size: Int64) throws(ImageError) -> CopyInput {
        guard size > content.virtualSize else { return self }
        let zeros = ZeroSource(virtualSize: size - content.virtualSize)
        return CopyInput(
            content: try ConcatenatedSource([content, zeros]),
            extents: try ConcatenatedSource([extents, zeros]))
    }
}
