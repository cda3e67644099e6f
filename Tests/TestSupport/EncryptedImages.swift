import Foundation
import Synchronization

/// Encrypted images: the options that name them and their secret, and qemu-img to make them.
public enum EncryptedImage {
    public static let passphrase = "correct horse"
    public static let secret = ["--object", "secret,id=s,data=\(passphrase)"]

    /// The value of `--image-opts` for an image.
    ///
    /// - Parameter format: `luks`, or `qcow2` for an encrypted one.
    public static func options(_ format: String, _ path: String) -> String {
        "driver=\(format),\(prefix(format))key-secret=s,file.filename=\(path)"
    }

    /// The prefix of the encryption's options.
    public static func prefix(_ format: String) -> String { format == "luks" ? "" : "encrypt." }

    /// The value of `-o` for a new image.
    ///
    /// - Parameter cipher: further options, without a prefix.
    public static func creation(_ format: String, cipher: String = "") -> String {
        let prefix = prefix(format)
        let all = ["key-secret=s", "iter-time=10"] + cipher.split(separator: ",").map(String.init)
        return (format == "luks" ? "" : "encrypt.format=luks,")
            + all.map { prefix + $0 }.joined(separator: ",")
    }

    /// Images that qemu-img has made, by their properties: it measures the processor for a second
    /// or two before it makes one.
    private static let made = Mutex<[String: [UInt8]]>([:])

    /// Has qemu-img make an image, or copies one that it made before.
    public static func make(
        _ format: String, _ path: String, size: String, cipher: String = "", options: String = ""
    ) throws {
        let key = "\(format) \(size) \(cipher) \(options)"
        if let bytes = made.withLock({ $0[key] }) {
            return try Data(bytes).write(to: URL(fileURLWithPath: path))
        }
        try require(
            "qemu-img",
            ["create", "-q", "-f", format] + secret + ["-o", creation(format, cipher: cipher)]
                + (options.isEmpty ? [] : ["-o", options]) + [path, size])
        let bytes = [UInt8](try contents(path))
        made.withLock { $0[key] = bytes }
    }

    /// Runs `qemu-io` commands on an image.
    public static func io(_ format: String, _ path: String, _ commands: [String]) throws {
        let output = try require(
            "qemu-io",
            secret + commands.flatMap { ["-c", $0] } + ["--image-opts", options(format, path)])
        if output.contains("failed") || output.contains("rror") {
            throw CommandError(description: "qemu-io \(commands): \(output)")
        }
    }

    /// The guest disk of an image, as qemu-img reads it.
    public static func disk(_ format: String, _ path: String) throws -> Data {
        let folder = try TempFolder()
        try require(
            "qemu-img",
            ["convert"] + secret + ["-O", "raw", "--image-opts", options(format, path)]
                + [folder.path("disk")])
        return try contents(folder.path("disk"))
    }
}
