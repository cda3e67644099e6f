import DiskImage
import ImageFormats
import ImageStorage

/// An image that is open for reading, with its backing chain.
public struct OpenedImage: Sendable {
    /// The images of the chain, the image itself first; never empty.
    public let layers: [OpenedLayer]

    public var format: ImageFormat { layers[0].format }
    /// The guest disk as the guest sees it.
    public var source: any ImageSource { LayeredSource(layers: layers.map(\.image)) }
    /// The image without its backing chain.
    public var topLayer: any Image { layers[0].image }
    /// The guest disk of the backing file; nil if there is none.
    public var backing: (any ImageSource)? {
        layers.count > 1 ? LayeredSource(layers: layers.dropFirst().map(\.image)) : nil
    }
    /// The mappings of the image alone: `.unallocated` where the backing file decides, `.zero` if
    /// there is none.
    public var ownLayer: any ImageSource {
        LayeredSource(layers: [topLayer], sizeBelow: backing?.virtualSize ?? 0)
    }
    /// The files of the chain, the image's first.
    public var files: [FileIdentity] { layers.flatMap(\.files) }
    /// All storages that are read, those of data files too.
    public var storages: [any Storage] { layers.flatMap(\.storages) }
    /// The largest `StorageTraits.requestsInFlight` in the chain.
    public var requestsInFlight: Int { storages.map(\.traits.requestsInFlight).max() ?? 0 }
    /// The largest `StorageTraits.requestSize` in the chain, in bytes.
    public var requestSize: Int64 { storages.map(\.traits.requestSize).max() ?? 0 }
}

extension Collection<OpenedLayer> {
    /// The guest disk of these images, of which each is the backing file of its predecessor; an
    /// empty disk if there are none.
    public var disk: any ImageSource {
        isEmpty ? ZeroSource(virtualSize: 0) : LayeredSource(layers: map(\.image))
    }
}

/// One image of a chain.
public struct OpenedLayer: Sendable {
    public let name: ImageName
    public let format: ImageFormat
    public let image: any Image
    /// The description of the image; nil if its name is a plain one.
    public let description: ImageDescription?
    /// The name of the file that holds the data; nil if the image's own file does.
    public let dataName: ImageName?

    public var storage: any Storage { image.storage }
    /// The image's storage and that of its data file.
    public var storages: [any Storage] {
        dataName == nil ? [image.storage] : [image.storage, image.dataStorage]
    }

    /// The files that hold the image's bytes.
    public var files: [FileIdentity] {
        storages.flatMap { storage in
            let whole = (storage as? StoragePart)?.whole ?? storage
            return (whole as? DiskStorage)?.files ?? [storage.file].compactMap { $0 }
        }
    }

    /// The name of what holds the image's data, in qemu's form.
    public var fileName: String {
        if let dataName { return Storages.driver(for: dataName).shownName(dataName) }
        if let description, !format.driver.isPlain, !description.isWhole {
            return description.shownName(format, level: 1)
        }
        return Storages.driver(for: name).shownName(name)
    }

    /// Distance in bytes from the start of the file to what the image's host offsets count from, as
    /// `map` shows them: that of a raw disk in an archive counts from the archive's start.
    public var shownOffset: Int64 {
        format.driver.isPlain ? description?.parts.reduce(0) { $0 + $1.offset } ?? 0 : 0
    }
}
