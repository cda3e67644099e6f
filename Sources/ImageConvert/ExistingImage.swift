import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage

/// An existing image that a conversion writes into (`-n`).
///
/// Parts that the conversion does not write keep their content. So the image is rebuilt from both,
/// with the properties of the old one.
struct ExistingImage {
    let rebuilt: any NewImage
    /// The image holds nothing that would have to be kept.
    private let isEmpty: Bool
    private let image: OpenedImage

    /// - Parameter name: name of the target.
    /// - Returns: nil if images of the format are plain: those are written as they stand.
    static func open(
        _ name: ImageName, _ format: ImageFormat, _ opener: ImageOpener
    ) async throws -> ExistingImage? {
        guard !format.driver.isPlain else { return nil }
        var opener = opener
        // The target is locked when it is opened for writing.
        opener.access.shareForced = true
        let image = try await opener.open(name, format: format)
        let rebuilt = try format.creator().newImage(
            like: image.topLayer, backingSize: image.backing?.virtualSize ?? 0)
        return ExistingImage(
            rebuilt: rebuilt, isEmpty: try await isEmpty(image.topLayer), image: image)
    }

    private static func isEmpty(_ layer: any ImageSource) async throws -> Bool {
        var walk = MappingWalk(layer)
        var position: Int64 = 0
        while position < layer.virtualSize {
            let mapping = try await walk.mapping(at: position, limit: layer.virtualSize)
            guard mapping.content == .unallocated else { return false }
            position = mapping.range.upperBound
        }
        return true
    }

    /// The content of the rebuilt image: `input`, and the old image below it.
    ///
    /// - Parameter leavesBacking: whether the input leaves out what the backing file provides
    ///   (`-B`): there the old image shows through.
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
            guard image.topLayer.backing != nil else {
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

    /// Whether the old image is read while the new one is written.
    func isNeeded(under input: CopyInput, leavesBacking: Bool) -> Bool {
        !isEmpty && (leavesBacking || image.source.virtualSize > input.content.virtualSize)
    }

    /// The files below the image, which are read while it is written.
    var filesBelow: [FileIdentity] {
        image.layers.dropFirst().flatMap(\.storages).compactMap(\.file)
    }
}

/// The source of a pipeline, and the source of the mappings that decide what is copied.
struct CopyInput {
    var content: any ImageSource
    var extents: any ImageSource

    /// Whether the size of the disk is an upper bound until its end has been reached.
    var isOpenEnded = false

    init(content: any ImageSource, extents: any ImageSource) {
        self.content = content
        self.extents = extents
    }

    init(openEnded image: any Image) {
        self.init(content: OpenEndedSource(image), extents: OpenEndedSource(image))
        isOpenEnded = true
    }

    /// Returns both sources with zeros at the end, up to a size in bytes.
    func padded(to size: Int64) throws(ImageError) -> CopyInput {
        guard size > content.virtualSize else { return self }
        let zeros = ZeroSource(virtualSize: size - content.virtualSize)
        return CopyInput(
            content: try ConcatenatedSource([content, zeros]),
            extents: try ConcatenatedSource([extents, zeros]))
    }
}
