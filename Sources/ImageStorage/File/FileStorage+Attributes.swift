import CLinux
import DiskImage
import Glibc

// Owner, mode, ACL, attributes and flags of a file.
extension FileStorage {
    /// Gives the file, which is still empty, the owner, mode, ACL, extended attributes and inode
    /// flags of another file.
    ///
    /// - Throws: `ImageError` for an attribute that cannot be set here.
    func takeAttributes(of other: FileStorage) throws(ImageError) {
        let old = try Syscall.status(other.descriptor, name)
        let new = try Syscall.status(descriptor, name)
        if old.st_uid != new.st_uid || old.st_gid != new.st_gid {
            guard fchown(descriptor, old.st_uid, old.st_gid) == 0 else {
                throw Syscall.failure(name, "cannot keep the owner")
            }
        }
        guard fchmod(descriptor, old.st_mode & 0o7777) == 0 else {
            throw Syscall.failure(name, "cannot keep the mode")
        }
        guard clinux_copy_inode_flags(other.descriptor, descriptor) == 0 else {
            throw Syscall.failure(name, "cannot keep the inode flags")
        }
        // ACLs and security labels are extended attributes, too.
        for attribute in try other.attributeNames() {
            let value = try attribute.withCString { attribute throws(ImageError) in
                try other.bytes { fgetxattr(other.descriptor, attribute, $0, $1) }
            }
            let isSet = attribute.withCString {
                fsetxattr(descriptor, $0, value, value.count, 0) == 0
            }
            guard isSet else {
                throw Syscall.failure(name, "cannot keep the attribute \(attribute.text)")
            }
        }
    }

    private func attributeNames() throws(ImageError) -> [[UInt8]] {
        let list = try bytes { buffer, count in
            flistxattr(descriptor, buffer?.assumingMemoryBound(to: CChar.self), count)
        }
        return list.split(separator: 0).map { Array($0) }
    }

    /// Gets bytes by two calls, one for their length. Empty if the file system has no attributes.
    private func bytes(
        _ call: (UnsafeMutableRawPointer?, Int) -> Int
    ) throws(ImageError) -> [UInt8] {
        let length = call(nil, 0)
        if length == 0 || length < 0 && errno == ENOTSUP { return [] }
        guard length > 0 else { throw Syscall.failure(name, "cannot read its attributes") }
        var value = [UInt8](repeating: 0, count: length)
        let count = value.withUnsafeMutableBytes { call($0.baseAddress, length) }
        guard count >= 0 else { throw Syscall.failure(name, "cannot read its attributes") }
        value.removeLast(length - count)
        return value
    }
}
