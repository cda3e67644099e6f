import Glibc

extension FileStorage {
    /// How much space the file takes on its file system, in bytes; nil if the system does not say.
    public var allocatedSize: Int64? {
        var status = stat()
        guard fstat(descriptor, &status) == 0 else { return nil }
        return Int64(status.st_blocks) * 512
    }
}
