import CFuzzer
import DiskImage
import Foundation
import Synchronization

/// The check of one input: it throws if the input is refused, and traps if something is wrong.
public typealias FuzzBody = @Sendable ([UInt8]) async throws -> Void

private let body = Mutex<FuzzBody?>(nil)

/// Hands the process to libFuzzer, with the program's own command line. Does not return.
public func runFuzzer(_ chosen: @escaping FuzzBody) -> Never {
    body.withLock { $0 = chosen }
    // Swift's runtime may have set these for its backtraces. libFuzzer would leave them to it, and
    // no failing input would be kept.
    for number in [SIGILL, SIGTRAP, SIGSEGV, SIGBUS, SIGFPE, SIGABRT] { signal(number, SIG_DFL) }
    var count = CommandLine.argc
    var arguments: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>! = CommandLine.unsafeArgv
    exit(LLVMFuzzerRunDriver(&count, &arguments) { runOne($0, $1) })
}

private func runOne(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
    let bytes = Array(UnsafeBufferPointer(start: start, count: count))
    guard let chosen = body.withLock({ $0 }) else { return -1 }
    let done = DispatchSemaphore(value: 0)
    Task {
        do {
            try await chosen(bytes)
        } catch is ImageError {
            // Most inputs are refused.
        } catch {
            fatalError("not an ImageError: \(error)")
        }
        done.signal()
    }
    done.wait()
    return 0
}
