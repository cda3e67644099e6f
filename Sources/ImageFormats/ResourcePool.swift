import Synchronization

/// Things that are costly to make and used by one task at a time, such as a codec's state.
final class ResourcePool<Resource: AnyObject & Sendable>: Sendable {
    private let idle = Mutex<[Resource]>([])
    private let make: @Sendable () -> Resource

    init(_ make: @escaping @Sendable () -> Resource) { self.make = make }

    func take() -> Resource { idle.withLock { $0.popLast() } ?? make() }

    func giveBack(_ resource: Resource) { idle.withLock { $0.append(resource) } }
}
