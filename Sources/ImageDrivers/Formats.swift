import DiskImage
import ImageFormats
import ImageStorage

extension ImageFormat {
    /// All formats. The first one that recognises an image's first bytes is the image's format.
    public static let all: [ImageFormat] = [
        .qcow2,
        .parallels,
        .luks,
        .raw,
    ]

    /// Formats that are recognised and refused: to take such an image for raw would give wrong
    /// data.
    private static let unreadable: [(name: String, magic: [UInt8], offset: Int)] = [
        ("qcow", Array("QFI".utf8) + [0xfb, 0, 0, 0, 1], 0),
        ("vmdk", Array("KDMV".utf8), 0), ("vmdk", Array("COWD".utf8), 0),
        ("vmdk", Array("# Disk DescriptorFile".utf8), 0),
        ("vhdx", Array("vhdxfile".utf8), 0), ("vpc", Array("conectix".utf8), 0),
        ("vdi", [0x7f, 0x10, 0xda, 0xbe], 64), ("qed", Array("QED\0".utf8), 0),
        // Version 2; version 1 is a format of its own.
        ("luks2", Array("LUKS".utf8) + [0xba, 0xbe], 0),
        ("bochs", Array("Bochs Virtual HD Image".utf8), 0),
        ("cloop", Array("#!/bin/sh\n#V2.0 Format\n".utf8), 0),
    ]

    /// The number of bytes at the start of an image that formats are recognised by.
    private static let probedLength: Int64 = 2048

    /// - Returns: nil if there is no format of that name.
    public static func named(_ name: String) -> ImageFormat? { all.first { $0.name == name } }

    /// The format that an image says its backing file has. Old images name one of qemu's drivers
    /// for files, which makes the file a raw disk.
    ///
    /// - Returns: nil if there is no format of that name.
    public static func ofBacking(_ name: String) -> ImageFormat? {
        named(["file", "host_device"].contains(name) ? ImageFormat.raw.name : name)
    }

    /// The formats that images can be created in, for help texts: "raw or qcow2".
    public static var creatableNames: String { names { _ in true } }

    /// The formats that images can be compressed in, for help texts.
    public static var compressingNames: String { names(where: \.canCompress) }

    private static func names(where isMeant: (any ImageCreator) -> Bool) -> String {
        all.filter { $0.driver.creator.map(isMeant) ?? false }.map(\.name).reversed()
            .joined(separator: " or ")
    }

    /// Recognises the format of an image by its first bytes.
    ///
    /// A caller that knows the format should not ask: the guest of a raw disk can write another
    /// format's header to it.
    ///
    /// - Throws: `ImageError` for a format that is recognised but cannot be read.
    public static func probe(_ storage: any Storage) async throws -> ImageFormat {
        var buffer = try IOBuffer(byteCount: Int(min(storage.size, probedLength)))
        var span = buffer.mutableBytes
        try await storage.read(into: &span, at: 0)
        let start = buffer.bytes
        let found = all.first { $0.driver.recognizes(start) } ?? .raw
        if found.driver.isPlain,
            let foreign = unreadable.first(where: { start.has($0.magic, at: $0.offset) })
        {
            throw ImageError.unsupported(
                storage.name,
                "the image is in format '\(foreign.name)', which is not supported "
                    + "(-f raw takes it as it is)")
        }
        return found
    }
}

extension RawSpan {
    fileprivate func has(_ magic: [UInt8], at offset: Int) -> Bool {
        guard offset + magic.count <= byteCount else { return false }
        return magic.indices.allSatisfy {
            unsafeLoad(fromByteOffset: offset + $0, as: UInt8.self) == magic[$0]
        }
    }
}
