import DiskImage

extension Qcow2Header {
    /// The header of a new image, before its tables have places.
    init(_ options: Qcow2Options, _ geometry: Qcow2Geometry) {
        self.init(
            version: options.version, geometry: geometry, compression: options.compression,
            backingFile: options.backing?.file, backingFormat: options.backing?.format,
            l1Entries: geometry.l1Entries, refcountBits: options.refcountBits)
        if let file = options.dataFile {
            dataFile = file
            incompatibleFeatures = IncompatibleFeature.externalDataFile
            if options.isDataFileRaw { autoclearFeatures = AutoclearFeature.rawDataFile }
        }
        if options.encryption != nil {
            encryptionMethod = Self.luks
            encryptionHeader = TableRange(offset: 0, length: 0)
        }
        if options.lazyRefcounts { compatibleFeatures = CompatibleFeature.lazyRefcounts }
        if version >= 3 { addFeatureNames() }
    }

    /// Adds the table of feature names, from which a program that does not know a feature can tell
    /// its user the name. As in qemu, small clusters leave their room to the name of the backing
    /// file.
    ///
    /// Source: QEMU's docs/interop/qcow2.txt, section "Feature name table".
    mutating func addFeatureNames() {
        guard geometry.clusterSize > 4096,
            !otherExtensions.contains(where: { $0.type == ExtensionType.featureNames })
        else { return }
        var table: [UInt8] = []
        for (kind, features) in Self.featureNames {
            for (feature, name) in features {
                table += [kind, UInt8(feature.trailingZeroBitCount)] + Array(name.utf8)
                table.appendZeros(upTo: table.count.roundedUp(to: Self.featureNameLength))
            }
        }
        otherExtensions.insert(Extension(type: ExtensionType.featureNames, content: table), at: 0)
    }

    /// Length of an entry in the table of feature names: kind, bit, and a name of 46 bytes.
    static let featureNameLength = 48

    /// The known features by kind, as the table numbers it, with the names that qemu gives them.
    private static let featureNames: [(kind: UInt8, features: [(bit: UInt64, name: String)])] = [
        (
            0,
            [
                (IncompatibleFeature.dirty, "dirty bit"),
                (IncompatibleFeature.corrupt, "corrupt bit"),
                (IncompatibleFeature.externalDataFile, "external data file"),
                (IncompatibleFeature.compressionType, "compression type"),
                (IncompatibleFeature.extendedL2, "extended L2 entries"),
            ]
        ),
        (1, [(CompatibleFeature.lazyRefcounts, "lazy refcounts")]),
        (
            2,
            [
                (AutoclearFeature.bitmaps, "bitmaps"),
                (AutoclearFeature.rawDataFile, "raw external data"),
            ]
        ),
    ]
}
