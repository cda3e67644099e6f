import Glibc
import Testing

@testable import HTTPStorage

@Suite struct HTTPLoopTests {
    private var isPipeBlocked: Bool {
        var mask = sigset_t()
        pthread_sigmask(SIG_BLOCK, nil, &mask)
        return sigismember(&mask, SIGPIPE) == 1
    }

    /// A server that closes its connection under TLS must not end the process.
    @Test func brokenPipesDoNotReachTheProcess() throws {
        let loop = try HTTPLoop(most: 1)
        let before = isPipeBlocked
        var inside = false
        loop.run {
            inside = isPipeBlocked
            // Would end the process if it could arrive, now or when the loop is left.
            pthread_kill(pthread_self(), SIGPIPE)
            return true
        }
        #expect(inside)
        #expect(isPipeBlocked == before)
    }
}
