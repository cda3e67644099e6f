import DiskImage
import ImageStorage
import MemoryImages
import TestSupport
import Testing

@testable import ImageFormats

/// Crashes while key slots change: some passphrase opens the disk at every moment.
@Suite struct KeySlotCrashTests {
    private static let passphrases = (0...2).map { SecretBytes(Array("hunter\($0)".utf8)) }

    private static func secrets() throws -> Secrets {
        var secrets = Secrets()
        for (number, passphrase) in passphrases.enumerated() {
            try secrets.add(passphrase, id: "\(number)")
        }
        return secrets
    }

    private func typed(_ text: String) throws -> TypedOptions {
        var options = try CreationOptions([Array(text.utf8)])
        options.secrets = try Self.secrets()
        return try TypedOptions(amending: options, .luks)
    }

    /// A header with short keys, which the first passphrase opens.
    private func header() throws -> [UInt8] {
        var options = try CreationOptions([
            Array("key-secret=0,iter-time=0,cipher-alg=aes-128,cipher-mode=cbc".utf8)
        ])
        options.secrets = try Self.secrets()
        let volume = try LUKSVolume(LUKSOptions(TypedOptions(options, for: .luks), prefix: ""))
        var bytes = volume.bytes
        bytes += [UInt8](repeating: 0, count: Int(volume.length) + 4096 - bytes.count)
        return bytes
    }

    /// The passphrases that open the disk.
    private func openers(_ bytes: [UInt8]) async throws -> [Int] {
        let storage = MemoryStorage(bytes, traits: StorageTraits())
        let header = try await LUKSHeader.read(from: storage)
        var found: [Int] = []
        for (number, passphrase) in Self.passphrases.enumerated() {
            guard (try? await header.masterKey(passphrase, in: storage)) != nil else { continue }
            found.append(number)
        }
        return found
    }

    @Test(
        arguments: [
            ("state=active,new-secret=1,iter-time=0", [0, 1]),
            ("state=active,new-secret=1,iter-time=0,keyslot=6", [0, 1]),
            ("state=active,new-secret=1,iter-time=0,keyslot=0", [1]),
            ("state=inactive,keyslot=0", []), ("state=inactive,old-secret=0", []),
        ], ["", "state=active,new-secret=2,iter-time=0"])
    func opensAfterACrash(_ change: (options: String, opened: [Int]), _ first: String) async throws
    {
        let storage = MemoryStorage(try header(), traits: StorageTraits())
        let secret = Self.passphrases[0]
        var others: [Int] = []
        if !first.isEmpty {
            var slots = try await LUKSKeySlots(storage, passphrase: secret)
            try await slots.amend(LUKSAmendment(typed(first), prefix: ""), force: false)
            others = [2]
        }
        let before = storage.bytes
        let made = storage.changes.count
        var slots = try await LUKSKeySlots(storage, passphrase: secret)
        try await slots.amend(LUKSAmendment(typed(change.options), prefix: ""), force: true)
        #expect(try await openers(storage.bytes) == change.opened + others)
        let erasesAll = change.opened.isEmpty && others.isEmpty
        try await play(Array(storage.changes[made...]), before) { bytes, story in
            let found = try await openers(bytes)
            #expect(erasesAll || !found.isEmpty, "\(story)")
            #expect(others.allSatisfy(found.contains), "\(story)")
        }
    }

    /// Plays a crash of the machine after each change, with any sectors lost that were written
    /// since the last flush.
    private func play(
        _ changes: [MemoryStorage.Change], _ before: [UInt8],
        _ check: ([UInt8], String) async throws -> Void
    ) async throws {
        var random = SplitMix64(seed: 1)
        for count in 0...changes.count {
            let flushed =
                changes[..<count].lastIndex { if case .flush = $0 { true } else { false } } ?? 0
            for round in 0..<3 {
                var bytes = before
                for (number, change) in changes[..<count].enumerated() {
                    for part in Self.sectors(change)
                    where number < flushed || round == 0 || random.once(in: 2) {
                        part.apply(to: &bytes)
                    }
                }
                try await check(bytes, "after \(count) of \(changes.count) changes, round \(round)")
            }
        }
    }

    private static func sectors(_ change: MemoryStorage.Change) -> [MemoryStorage.Change] {
        guard case .write(let offset, let bytes) = change else { return [change] }
        let sector = 512
        return stride(
            from: offset / sector * sector, to: offset + bytes.count, by: sector
        ).map { start in
            let (first, end) = (max(start, offset), min(start + sector, offset + bytes.count))
            return .write(first, Array(bytes[first - offset..<end - offset]))
        }
    }

    /// A write that fails leaves a header that opens.
    @Test(arguments: 0..<14)
    func opensAfterAnError(_ number: Int) async throws {
        let storage = MemoryStorage(try header(), traits: StorageTraits())
        var slots = try await LUKSKeySlots(storage, passphrase: Self.passphrases[0])
        storage.fail(at: number, count: .max / 2)
        await #expect(throws: MemoryStorage.failure) {
            try await slots.amend(
                LUKSAmendment(
                    typed("state=active,new-secret=1,iter-time=0,keyslot=0"), prefix: ""),
                force: true)
        }
        #expect(try await !openers(storage.bytes).isEmpty)
    }
}
