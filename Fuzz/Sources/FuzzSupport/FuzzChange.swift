import DiskImage
import ImageFormats

/// Checks that a repair or a resize keeps the content that could be read before.
public enum FuzzChange {
    public static func repair(_ bytes: [UInt8], _ before: [UInt8]?) async throws {
        let storage = FuzzStorage(bytes)
        do {
            let result = try await Qcow2ImageChecker().repair(storage, .all) { _ in }
            guard result.checkErrors == 0 else { return }
        } catch is ImageError {
            return
        }
        try await expect(before, in: storage)
    }

    public static func resize(_ bytes: [UInt8], _ before: [UInt8]?) async throws {
        let header = try await Qcow2Source(FuzzStorage(bytes)).header
        let size = header.geometry.virtualSize
        guard size <= 1 << 20 else { return }
        let steps: [(Int64, Preallocation)] = [
            (size + 300_032, .off), (size + 300_032, .metadata), (size / 3, .off),
        ]
        for (target, preallocation) in steps {
            let storage = FuzzStorage(bytes)
            let new = max(512, target / 512 * 512)
            do {
                var resizer = try await Qcow2Resizer(
                    storage: storage, header: header, backing: nil)
                try await resizer.resize(to: new, preallocation: preallocation)
            } catch is ImageError {
                try await expect(before, in: storage)
                continue
            }
            try await expect(
                before.map {
                    $0.prefix(Int(new)) + [UInt8](repeating: 0, count: max(0, Int(new) - $0.count))
                }, in: storage)
            let check = try await Qcow2ImageChecker().check(storage) { _ in }
            precondition(check.corruptions == 0 && check.checkErrors == 0, "\(check)")
        }
    }

    private static func expect(_ content: [UInt8]?, in storage: FuzzStorage) async throws {
        guard let content else { return }
        do {
            let after = try await FuzzDisk(Qcow2Source(storage)).content()
            precondition(after == content, "the disk has changed")
        } catch let error as ImageError {
            fatalError("the disk cannot be read any more: \(error)")
        }
    }
}
