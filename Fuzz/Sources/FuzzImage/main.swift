import FuzzSupport
import ImageFormats

// Reads the whole disk, and reads it again after each change in place.
runFuzzer { bytes in
    let before = try? await FuzzDisk(Qcow2Source(FuzzStorage(bytes))).content()
    try await FuzzChange.repair(bytes, before)
    try await FuzzChange.resize(bytes, before)
}
