import FuzzSupport
import ImageFormats

// The whole disk, and once more after what is done to an image in place.
runFuzzer { bytes in
    let before = try? await FuzzDisk(Qcow2Source(FuzzStorage(bytes))).content()
    try await FuzzChange.repair(bytes, before)
    try await FuzzChange.resize(bytes, before)
}
