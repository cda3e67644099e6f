import FuzzSupport
import ImageFormats

// The header, its extensions, the tables of snapshots and bitmaps: all that `info` shows.
runFuzzer { _ = try await Qcow2Driver().facts(of: FuzzStorage($0)) }
