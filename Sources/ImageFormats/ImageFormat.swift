import DiskImage
import ImageStorage

/// The disk formats that can be read and written, by qemu's names. The one place that lists them.
public enum ImageFormat: String, Sendable, CaseIterable {
    case raw
    case qcow2

    /// Looks at the first bytes of a file.
    ///
    /// A raw disk belongs to its guest, who may write another format's header into it: whoever knows
    /// the format should say so instead of asking here.
    ///
    /// - Throws: `ImageError` for a format that is known but cannot be read: taking it for raw would
    ///   give wrong data.
    public static func probe(_ storage: any Storage) async throws -> ImageFormat {
        let length = Int(min(storage.size, 2048))
        var buffer = try IOBuffer(byteCount: length)
        var span = buffer.mutableBytes
        try await storage.read(into: &span, at: 0)
        let bytes = buffer.bytes
        func has(_ magic: [UInt8], at offset: Int = 0) -> Bool {
            guard offset + magic.count <= length else { return false }
            return magic.indices.allSatisfy {
                bytes.unsafeLoad(fromByteOffset: offset + $0, as: UInt8.self) == magic[$0]
            }
        }
        if has(Array("QFI".utf8) + [0xfb]) {
            guard length >= 8 else { return .raw }
            let version = bytes.bigEndian(at: 4, as: UInt32.self)
            if version >= 2 { return .qcow2 }
            if version == 1 { throw unsupported(storage, "qcow") }
            return .raw
        }
        for (name, magic, offset) in foreignMagic where has(magic, at: offset) {
            throw unsupported(storage, name)
        }
        return .raw
    }

    private static func unsupported(_ storage: any Storage, _ format: String) -> ImageError {
        .unsupported(
            storage.name,
            "the image is in format '\(format)', which is not supported (-f raw takes it as it is)")
    }

    private static let foreignMagic: [(name: String, magic: [UInt8], offset: Int)] = [
        ("vmdk", Array("KDMV".utf8), 0), ("vmdk", Array("COWD".utf8), 0),
        ("vmdk", Array("# Disk DescriptorFile".utf8), 0),
        ("vhdx", Array("vhdxfile".utf8), 0), ("vpc", Array("conectix".utf8), 0),
        ("vdi", [0x7f, 0x10, 0xda, 0xbe], 64), ("qed", Array("QED\0".utf8), 0),
        ("luks", Array("LUKS".utf8) + [0xba, 0xbe], 0),
        ("parallels", Array("WithoutFreeSpace".utf8), 0),
        ("parallels", Array("WithouFreSpacExt".utf8), 0),
        ("bochs", Array("Bochs Virtual HD Image".utf8), 0),
        ("cloop", Array("#!/bin/sh\n#V2.0 Format\n".utf8), 0),
    ]
}
