import DiskImage
import Glibc

/// Runs a body on a new, detached thread, which may block.
///
/// The stack leaves the margin of memory alone: threads are started at any moment, and two stacks
/// are as long as the margin.
///
/// - Returns: 0, or the errno that says why the thread could not be started.
package func startThread(_ body: @escaping @Sendable () -> Void) -> Int32 {
    final class Box: Sendable {
        let body: @Sendable () -> Void
        init(_ body: @escaping @Sendable () -> Void) { self.body = body }
    }
    let box = Unmanaged.passRetained(Box(body))
    var thread = pthread_t()
    let status =
        (try? MemoryMargin.take(defaultStackSize) {
            pthread_create(
                &thread, nil,
                { context in
                    guard let context else { return nil }
                    Unmanaged<Box>.fromOpaque(context).takeRetainedValue().body()
                    return nil
                }, box.toOpaque())
        }) ?? ENOMEM
    if status == 0 { pthread_detach(thread) } else { box.release() }
    return status
}

/// In bytes.
private let defaultStackSize: Int = {
    var attributes = pthread_attr_t()
    pthread_attr_init(&attributes)
    defer { pthread_attr_destroy(&attributes) }
    var size = 0
    return pthread_attr_getstacksize(&attributes, &size) == 0 ? size : 8 << 20
}()
