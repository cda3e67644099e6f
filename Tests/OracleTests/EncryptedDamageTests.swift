import Foundation
import TestSupport
import Testing

/// LUKS headers in which one number is wrong: one line, and nothing is written.
@Suite(.enabled(if: Qemu.isInstalled, "the images are qemu-img's")) struct EncryptedDamageTests {
    struct Damage: Sendable, CustomStringConvertible {
        let offset: Int
        let bytes: [UInt8]
        let says: String
        /// Whether `info` shows the image, because it needs no key.
        let isShown: Bool

        init(_ offset: Int, _ bytes: [UInt8], _ says: String, isShown: Bool = false) {
            self.offset = offset
            self.bytes = bytes
            self.says = says
            self.isShown = isShown
        }

        var description: String { "\(offset): \(bytes.prefix(8)), \(says)" }
    }

    private static func text(_ text: String) -> [UInt8] { Array(text.utf8) + [0] }
    private static let most: [UInt8] = [255, 255, 255, 255]

    static let all = [
        Damage(7, [3], "not one of version 1"), Damage(0, [0], "not one of version 1"),
        Damage(8, Array(repeating: 97, count: 32), "no end"),
        Damage(40, Array(repeating: 97, count: 32), "no end"),
        Damage(72, Array(repeating: 97, count: 32), "no end"),
        Damage(8, text("aesx"), "not supported"), Damage(8, text(""), "not supported"),
        Damage(40, text("xts"), "names no cipher"), Damage(40, text("-"), "names no cipher"),
        Damage(40, text("ctr-plain64"), "not supported"),
        Damage(40, text("xts-random"), "not supported"),
        Damage(40, text("xts-essiv"), "not supported"),
        Damage(40, text("cbc-essiv:sha1"), "not supported"),
        Damage(40, text("cbc-essiv:nothing"), "not supported"),
        Damage(72, text("sha9"), "not supported"), Damage(72, text("crc32"), "not supported"),
        Damage(104, [0, 0, 0, 0], "lies in the payload"),
        Damage(104, most, "beyond the end of the file"),
        Damage(108, [0, 0, 0, 0], "names no cipher"), Damage(108, most, "names no cipher"),
        Damage(108, [0, 0, 0, 65], "names no cipher"), Damage(108, [0, 0, 0, 33], "not supported"),
        Damage(112, [1, 2, 3], "Invalid password", isShown: true),
        Damage(132, [1, 2, 3], "Invalid password", isShown: true),
        Damage(164, [0, 0, 0, 0], "Invalid password", isShown: true),
        Damage(208, [0, 0, 0, 5], "state is unknown"),
        Damage(208, [0, 0, 0xde, 0xad], "Invalid password", isShown: true),
        Damage(212, [0, 0, 0, 0], "no iterations"),
        Damage(216, [1, 2, 3], "Invalid password", isShown: true),
        Damage(248, [0, 0, 0, 0], "lies in the header"), Damage(248, most, "lies in the payload"),
        Damage(248, [0, 0, 0, 100], "overlaps"),
        Damage(252, [0, 0, 0, 0], "stripes"), Damage(252, most, "stripes"),
        Damage(296, [0, 0, 0, 8], "overlaps"),
        Damage(5000, [1, 2, 3], "Invalid password", isShown: true),
    ]

    private func change(_ path: String, _ offset: Int, _ bytes: [UInt8]) throws {
        let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
        try file.seek(toOffset: UInt64(offset))
        file.write(Data(bytes))
        try file.close()
    }

    private func expectRefusals(
        _ damage: Damage, _ format: String, _ path: String, in folder: TempFolder
    ) throws {
        let named = EncryptedImage.secret + ["--image-opts", EncryptedImage.options(format, path)]
        let own = try Swimg.convert(named + ["-O", "raw", folder.path("target")], timeout: 20)
        #expect(own.status == 1 && own.errorText.contains(damage.says), "\(own)")
        #expect(own.errorText.split(separator: "\n").count == 1, "\(own)")
        #expect(!FileManager.default.fileExists(atPath: folder.path("target")))
        let info = try run(Swimg.path, ["info", "-f", format, path])
        #expect(info.status == 0 || info.status == 1, "\(info)")
        if damage.isShown { #expect(info.isSuccess, "\(info)") }
    }

    @Test(arguments: some(16, of: all))
    func luks(_ damage: Damage) throws {
        let folder = try TempFolder()
        let path = folder.path("image")
        try EncryptedImage.make("luks", path, size: "1M")
        try change(path, damage.offset, damage.bytes)
        try expectRefusals(damage, "luks", path, in: folder)
    }

    /// The damaged headers in a qcow2 image, and wrong places of the header.
    @Test func qcow2() throws {
        let folder = try TempFolder()
        let model = folder.path("model")
        try EncryptedImage.make("qcow2", model, size: "1M")
        let bytes = [UInt8](try contents(model))
        // The header extension: its type, its length, and the offset of the LUKS header.
        let mark: [UInt8] = [0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16]
        let place = try #require(
            (0..<4096).first { Array(bytes[$0..<$0 + mark.count]) == mark })
        let start = bytes[place + 8..<place + 16].reduce(0) { $0 << 8 | Int($1) }
        let header = Self.all.filter { $0.says != "beyond the end of the file" }.map {
            Damage(start + $0.offset, $0.bytes, $0.says, isShown: $0.isShown)
        }
        let places = [
            Damage(place + 8, [127], "beyond the end"), Damage(place + 8, [255], "beyond the end"),
            Damage(place + 15, [1], "no multiple of the cluster size"),
            Damage(place + 16, [127], "beyond the end"),
            Damage(place + 16, [0, 0, 0, 0, 0, 0, 2], "too short"),
            Damage(place + 16, [0, 0, 0, 0, 0, 0, 16, 0], "cannot read"),
            Damage(place + 7, [15], "no LUKS header"), Damage(35, [3], "method 3"),
        ]
        for damage in header + places {
            let path = folder.path("image")
            try Data(bytes).write(to: URL(fileURLWithPath: path))
            try change(path, damage.offset, damage.bytes)
            try expectRefusals(damage, "qcow2", path, in: folder)
        }
    }

    /// Billions of iterations are valid, and a signal ends them.
    @Test(arguments: [212, 164])
    func hoursOfWorkCanBeStopped(_ offset: Int) throws {
        let folder = try TempFolder()
        let path = folder.path("image")
        try EncryptedImage.make("luks", path, size: "1M")
        try change(path, offset, Self.most)
        let process = try RunningProcess(
            Swimg.path,
            ["digest"] + EncryptedImage.secret
                + ["--image-opts", EncryptedImage.options("luks", path)])
        #expect(!process.wait(until: { false }, timeout: 1))
        process.send(SIGTERM)
        let outcome = try process.wait(timeout: 20)
        #expect(outcome.status == 128 + SIGTERM, "\(outcome)")
    }

    /// A cluster that the file does not have in full would decrypt to noise.
    @Test func cutShort() throws {
        let folder = try TempFolder()
        let path = folder.path("image")
        try EncryptedImage.make("qcow2", path, size: "1M")
        try EncryptedImage.io("qcow2", path, ["write -P 7 0 64k"])
        let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
        try file.truncate(atOffset: UInt64(try contents(path).count) - 4096)
        try file.close()
        let damage = Damage(0, [], "the file ends at", isShown: true)
        try expectRefusals(damage, "qcow2", path, in: folder)
    }

    /// Version 2 is refused by name, and not taken for a raw disk.
    @Test func version2() throws {
        let folder = try TempFolder()
        let path = folder.path("image")
        try EncryptedImage.make("luks", path, size: "1M")
        try change(path, 7, [2])
        let own = try Swimg.convert("-O", "raw", path, folder.path("target"))
        #expect(own.status == 1 && own.errorText.contains("'luks2'"), "\(own)")
    }
}
