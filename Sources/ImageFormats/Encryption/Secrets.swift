import DiskImage
import ImageStorage

/// The secrets that a person gave (`--object secret,…`), by their ids.
public struct Secrets: Sendable {
    private var values: [String: SecretBytes] = [:]

    public init() {}

    /// - Throws: `ImageError` if another secret has the id.
    public mutating func add(_ secret: SecretBytes, id: String) throws(ImageError) {
        guard values.updateValue(secret, forKey: id) == nil else {
            throw .invalid("attempt to add duplicate secret '\(id)'")
        }
    }

    /// The secret with an id, which has to be text.
    ///
    /// - Parameter prefix: stands before `key-secret` in the option that names the id.
    /// - Throws: `ImageError` without a file's name, in qemu's words.
    func passphrase(_ id: String?, prefix: String) throws(ImageError) -> SecretBytes {
        guard let id else {
            throw .invalid("Parameter '\(prefix)key-secret' is required for cipher")
        }
        guard let secret = values[id] else { throw .invalid("No secret with id '\(id)'") }
        guard secret.isText else { throw .invalid("Data from secret \(id) is not valid UTF-8") }
        return secret
    }
}

extension SecretBytes {
    /// Whether the bytes are UTF-8 without NUL. A string of them would stay in memory.
    fileprivate var isText: Bool {
        withBytes { bytes in
            var rest = bytes.makeIterator()
            var decoder = UTF8()
            while true {
                switch decoder.decode(&rest) {
                case .scalarValue("\0"), .error: return false
                case .scalarValue: continue
                case .emptyInput: return true
                }
            }
        }
    }
}

extension StorageOptions {
    /// The secrets of encrypted images, which reach format drivers as an `ImageKey`.
    public var secrets: Secrets {
        get { self[Secrets.self] ?? Secrets() }
        set { self[Secrets.self] = newValue }
    }
}

/// The encryption that a description (`json:`, `--image-opts`) names.
public struct DescribedEncryption: Sendable, Equatable {
    /// The format of the encryption (`encrypt.format`); nil if the description does not name it.
    public var format: String?
    /// The id of the secret (`key-secret`, `encrypt.key-secret`).
    public var secret: String?

    public init() {}
}

/// The key to an image that may be encrypted: what its description says, and all secrets.
public struct ImageKey: Sendable {
    let described: DescribedEncryption
    private let secrets: Secrets
    private let isOptional: Bool

    /// - Parameter isOptional: whether an image may be opened without its secret. Everything but
    ///   its data can be read then.
    public init(
        _ described: DescribedEncryption? = nil, secrets: Secrets = Secrets(),
        isOptional: Bool = false
    ) {
        self.described = described ?? DescribedEncryption()
        self.secrets = secrets
        self.isOptional = isOptional
    }

    /// Makes the cipher of an image with the passphrase or, if that may be missing and is not
    /// named, one that cannot encrypt and decrypt; the parameters are those of `passphrase`.
    func cipher(
        prefix: String, image: String, _ unlock: (SecretBytes) async throws -> DiskCipher
    ) async throws -> DiskCipher {
        let passphrase: SecretBytes
        do {
            passphrase = try self.passphrase(prefix: prefix, image: image)
        } catch {
            guard isOptional, described.secret == nil else { throw error }
            return DiskCipher(missing: error)
        }
        return try await unlock(passphrase)
    }

    /// - Parameters:
    ///   - prefix: as for `Secrets.passphrase`.
    ///   - image: the image's name, for messages.
    func passphrase(prefix: String, image: String) throws(ImageError) -> SecretBytes {
        do {
            return try secrets.passphrase(described.secret, prefix: prefix)
        } catch {
            throw ImageError(error.kind, path: image, error.message).opening(image)
        }
    }
}
