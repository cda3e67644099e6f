import DiskImage
import ImageDrivers
import ImageFormats
import ImageStorage

/// An existing image that a conversion writes into where it stands (`-n`), as it was before.
struct ExistingImage {
    private let image: OpenedImage

    /// - Parameter name: name of the target.
    /// - Returns: nil if images of the format are plain: those need no look.
    static func open(
        _ name: ImageName, _ format: ImageFormat, _ opener: ImageOpener
    ) async throws -> ExistingImage? {
        guard !format.driver.isPlain else { return nil }
        var opener = opener
        // The target is locked when it is opened for writing.
        opener.access.shareForced = true
        return ExistingImage(image: try await opener.open(name, format: format))
    }

    func written(leavesBacking: Bool) throws(ImageError) -> any WrittenImage {
        try image.format.creator().existingImage(image.topLayer, leavesBacking: leavesBacking)
    }

    /// The content to write: `input`, and the rest of the last cluster as it was.
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
            // A cluster is written whole, also where the input leaves a part of it out.
            input.content = LayeredSource(layers: [input.extents, image.source])
        }
        let end = min(size, written.roundedUp(to: image.topLayer.readGranularity))
        guard end > written else { return input }
        input.content = try ConcatenatedSource([
            input.content, SliceSource(image.source, written..<end),
        ])
        input.extents = try ConcatenatedSource([
            input.extents,
            SliceSource(leavesBacking ? image.ownLayer : image.source, written..<end),
        ])
        return input
    }

    /// Name of the data file; nil if the image holds its data itself.
    var dataName: ImageName? { image.layers[0].dataName }

    /// The files below the image, which are not to be written.
    var filesBelow: [FileIdentity] { image.layers.dropFirst().flatMap(\.files) }
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
