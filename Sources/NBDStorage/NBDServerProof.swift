import DiskImage
import Glibc
import ImageStorage

/// The proof of identity that a server behind TLS (`nbds://…`) has to give.
///
/// libnbd verifies certificates. Before the fix of CVE-2024-7383 (1.18.5, 1.20.2) it did not on
/// unix sockets, nor with the system's authorities, to which it also falls back if the chosen
/// folder does not exist. So this type predicts what libnbd will do, and refuses what would end in
/// no proof.
struct NBDServerProof {
    /// Whether any server will do, because a person said so.
    private(set) var isWaived = false
    /// The folder with the authorities' certificates; nil leaves the choice to libnbd.
    private(set) var folder: HostPath?

    private static let authorities = Array("/ca-cert.pem".utf8)
    private static let wayOut = "(tls-verify-peer=false accepts any server)"

    /// - Throws: `ImageError` if the server would be accepted without proof, or if keys or
    ///   certificates cannot be read.
    init(_ address: NBDAddress, library: NBDLibraryVersion) throws(ImageError) {
        guard address.isSecure else { return }
        if let keys = address.parameter("tls-psk-file").map({ HostPath(bytes: $0) }) {
            try Self.requireReadable(keys, address)
            return
        }
        if let verify = address.parameter("tls-verify-peer")?.text {
            guard let verifies = Self.truth(verify) else {
                throw Self.refusal(
                    address, "tls-verify-peer is '\(verify)' and neither true nor false")
            }
            isWaived = !verifies
        }
        guard !isWaived else { return }
        if let chosen = address.parameter("tls-certificates").map({ HostPath(bytes: $0) }) {
            try Self.requireReadable(HostPath(bytes: chosen.bytes + Self.authorities), address)
        } else if !library.verifiesBySystem {
            folder = Self.usualFolders.first { Self.isReadable($0.bytes + Self.authorities) }
            guard folder != nil else {
                throw Self.refusal(
                    address,
                    "libnbd \(library.text) does not verify a server by the system's authorities: "
                        + "tls-certificates=FOLDER with a ca-cert.pem is needed \(Self.wayOut)")
            }
        }
        guard library.verifiesBySystem || !address.isUnixSocket else {
            throw Self.refusal(
                address,
                "libnbd \(library.text) does not verify certificates on unix sockets: "
                    + "tls-psk-file is needed \(Self.wayOut)")
        }
    }

    /// The folders in which libnbd looks by itself (nbd_set_tls_certificates(3)).
    private static var usualFolders: [HostPath] {
        guard geteuid() != 0 else { return ["/etc/pki/libnbd"] }
        guard let home = getenv("HOME") else { return [] }
        let bytes = Array(UnsafeRawBufferPointer(start: home, count: strlen(home)))
        return ["/.pki/libnbd", "/.config/pki/libnbd"].map {
            HostPath(bytes: bytes + Array($0.utf8))
        }
    }

    /// The value of a word as libnbd reads it.
    private static func truth(_ word: String) -> Bool? {
        switch word.lowercased() {
        case "1", "y", "yes", "t", "true", "on": true
        case "0", "n", "no", "f", "false", "off": false
        default: nil
        }
    }

    private static func isReadable(_ path: [UInt8]) -> Bool {
        path.withCString { access($0, R_OK) == 0 }
    }

    private static func requireReadable(
        _ path: HostPath, _ address: NBDAddress
    ) throws(ImageError) {
        guard !isReadable(path.bytes) else { return }
        throw Syscall.failure(address.name, "cannot read '\(path)'")
    }

    private static func refusal(_ address: NBDAddress, _ reason: String) -> ImageError {
        ImageError(.unsupported, path: address.name, "cannot connect: \(reason)")
    }
}

/// The version of the libnbd that was loaded.
struct NBDLibraryVersion {
    /// The version as libnbd reports it: three numbers with dots between them.
    let text: String

    /// Whether the fix of CVE-2024-7383 is in: certificates are verified by the system's
    /// authorities and on unix sockets, too.
    var verifiesBySystem: Bool {
        let numbers = text.split(separator: ".").map { Int($0) ?? 0 }
        guard numbers.count >= 3 else { return false }
        switch (numbers[0], numbers[1]) {
        case (1, 18): return numbers[2] >= 5
        case (1, 20): return numbers[2] >= 2
        case (let major, let minor): return major > 1 || minor > 20
        }
    }
}
