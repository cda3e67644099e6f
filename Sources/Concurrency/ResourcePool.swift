import DiskImage
import Synchronization

/// Objects that are costly to make and used by one task at a time, such as a codec's state.
package final class ResourcePool<Resource: AnyObject & Sendable>: Sendable {
    private let idle = Mutex<[Resource]>([])
    private let make: @Sendable () throws(ImageError) -> Resource

    package init(_ make: @escaping @Sendable () throws(ImageError) -> Resource) { self.make = make }

    /// - Throws: `ImageError` if an object has to be made and there is no memory for it.
    package func take() throws(ImageError) -> Resource {
        if let resource = idle.withLock({ $0.popLast() }) { return resource }
        return try make()
    }

    package func giveBack(_ resource: Resource) { idle.withLock { $0.append(resource) } }
}
