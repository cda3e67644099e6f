import FuzzSupport
import ImageFormats

// L1 and L2 tables, refcount table and blocks: `map` asks for them, and `check` walks them.
runFuzzer { bytes in
    let storage = FuzzStorage(bytes)
    _ = try? await Qcow2ImageChecker().check(storage) { _ in }
    let source = try await Qcow2Source(storage)
    try await FuzzDisk(source).walk()
    precondition(storage.bytes == bytes, "reading has changed the image")
}
