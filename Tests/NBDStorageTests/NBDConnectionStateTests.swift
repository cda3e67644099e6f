import DiskImage
import Testing

@testable import NBDStorage

/// Tests every transition of a connection's state.
@Suite struct NBDConnectionStateTests {
    typealias State = NBDConnectionState

    private let start = ContinuousClock.now
    private let cause = ImageError(.system(errno: 104), path: "nbd://x", "gone")
    private let other = ImageError(.invalid, path: "nbd://x", "refused")

    private func after(_ seconds: Double) -> ContinuousClock.Instant { start + .seconds(seconds) }

    /// A state in each phase, by its name.
    private func state(_ name: String, reconnectTime: Int? = nil) -> State {
        var state = State(isOpen: name != "unopened", reconnectTime: reconnectTime)
        switch name {
        case "draining": _ = state.close(isIdle: false)
        case "closing": _ = state.close(isIdle: true)
        case "lost": _ = state.broken(cause, isBusy: false, at: start)
        case "connecting":
            state = State(isOpen: false, reconnectTime: reconnectTime)
            _ = state.needed(at: start)
        case "failed": _ = state.broken(cause, isBusy: true, isFinal: true, at: start)
        case "ended": _ = state.abort()
        default: break
        }
        return state
    }

    private static let phases = [
        "unopened", "open", "draining", "closing", "lost", "connecting", "failed", "ended",
    ]

    @Test func eachPhaseIsReached() {
        let expected: [State.Phase] = [
            .unopened, .open, .draining, .closing, .lost(cause), .connecting, .failed(cause),
            .ended,
        ]
        #expect(Self.phases.map { state($0).phase } == expected)
    }

    @Test(arguments: [
        ("unopened", State.Action.connect(after: 0)), ("open", .send), ("draining", .send),
        ("closing", .cancel), ("connecting", .nothing), ("ended", .cancel),
    ])
    func requestsAreNeeded(_ phase: String, _ action: State.Action) {
        var state = state(phase)
        #expect(state.needed(at: start) == action)
    }

    @Test func requestsOfALostConnectionFail() {
        var lost = state("lost")
        #expect(lost.needed(at: start) == .fail(cause) && lost.phase == .failed(cause))
        #expect(lost.needed(at: start) == .fail(cause))
    }

    @Test func requestsOfALostConnectionWaitWhereThatIsAllowed() {
        var lost = state("lost", reconnectTime: 5)
        #expect(lost.needed(at: after(60)) == .connect(after: 0) && lost.phase == .connecting)
        #expect(lost.connected() == .send && lost.phase == .open)
    }

    @Test(arguments: ["open", "draining"])
    func aBrokenConnectionWithRequestsFails(_ phase: String) {
        var state = state(phase)
        #expect(state.broken(cause, isBusy: true, at: start) == .fail(cause))
        #expect(state.phase == .failed(cause))
    }

    @Test(arguments: ["open", "draining"])
    func aBrokenConnectionIsMadeAnewWhereThatIsAllowed(_ phase: String) {
        var state = state(phase, reconnectTime: 5)
        #expect(state.broken(cause, isBusy: true, at: start) == .connect(after: 0))
        #expect(state.phase == .connecting)
        #expect(state.connected() == .send)
        #expect(state.phase == (phase == "open" ? .open : .draining))
    }

    /// A server that breaks the protocol would do so again.
    @Test func aServersFaultIsFinal() {
        var state = state("open", reconnectTime: 5)
        #expect(state.broken(cause, isBusy: true, isFinal: true, at: start) == .fail(cause))
    }

    @Test func anIdleConnectionIsLostInSilence() {
        var open = state("open", reconnectTime: 5)
        #expect(open.broken(cause, isBusy: false, at: start) == .nothing)
        #expect(open.phase == .lost(cause))
        var draining = state("draining")
        #expect(draining.broken(cause, isBusy: false, at: start) == .nothing)
        #expect(draining.phase == .ended)
    }

    /// Events after the goodbye do not open a connection again.
    @Test(arguments: [nil, 5])
    func theEndOfAClosingConnectionIsTheEnd(_ reconnectTime: Int?) {
        var state = state("closing", reconnectTime: reconnectTime)
        #expect(state.broken(cause, isBusy: false, at: start) == .nothing && state.phase == .ended)
        #expect(state.broken(cause, isBusy: true, at: start) == .nothing && state.phase == .ended)
    }

    @Test(arguments: ["unopened", "closing", "lost", "connecting", "failed", "ended"])
    func breakingChangesNothingWithoutAConnection(_ phase: String) {
        var state = state(phase, reconnectTime: 5)
        let before = phase == "closing" ? State.Phase.ended : state.phase
        #expect(state.broken(other, isBusy: true, at: start) == .nothing && state.phase == before)
    }

    @Test func attemptsGoOnUntilTheTimeIsOver() {
        var state = state("open", reconnectTime: 5)
        #expect(state.broken(cause, isBusy: true, at: start) == .connect(after: 0))
        #expect(state.refused(other, at: after(0.1)) == .connect(after: 100))
        #expect(state.refused(other, at: after(0.3)) == .connect(after: 200))
        for _ in 0..<10 {
            #expect(state.refused(other, at: after(4)) != .fail(other))
        }
        // Pauses grow up to a second.
        #expect(state.refused(other, at: after(4.9)) == .connect(after: 1000))
        #expect(state.refused(other, at: after(5)) == .fail(other))
        #expect(state.phase == .failed(other))
    }

    /// Connections that break repeatedly without one answer count as one loss.
    @Test func onlyAnAnswerBeginsANewLoss() {
        var state = state("open", reconnectTime: 5)
        for second in 0..<5 {
            #expect(state.broken(cause, isBusy: true, at: after(Double(second))) != .fail(cause))
            #expect(state.connected() == .send)
        }
        var answered = state
        #expect(state.broken(cause, isBusy: true, at: after(5)) == .fail(cause))
        answered.answered()
        #expect(answered.broken(cause, isBusy: true, at: after(5)) == .connect(after: 0))
    }

    @Test func anotherExportIsFinal() {
        var state = state("open", reconnectTime: 5)
        _ = state.broken(cause, isBusy: true, at: start)
        #expect(state.refused(other, isFinal: true, at: start) == .fail(other))
    }

    /// The user allowed no reconnection: a refused first connection is not tried again.
    @Test func aFirstConnectionThatIsRefusedFails() {
        var state = state("connecting")
        #expect(!state.wasOpen)
        #expect(state.refused(other, at: start) == .fail(other) && state.phase == .failed(other))
        var good = self.state("connecting")
        #expect(good.connected() == .send && good.wasOpen)
    }

    @Test(arguments: [
        ("open", true, State.Action.sayGoodbye, State.Phase.closing),
        ("open", false, .nothing, .draining), ("draining", true, .sayGoodbye, .closing),
        ("draining", false, .nothing, .draining), ("unopened", true, .nothing, .ended),
        ("closing", true, .nothing, .closing), ("connecting", false, .nothing, .connecting),
        ("ended", true, .nothing, .ended),
    ])
    func closing(_ phase: String, _ isIdle: Bool, _ action: State.Action, _ next: State.Phase) {
        var state = state(phase)
        #expect(state.close(isIdle: isIdle) == action && state.phase == next && state.isClosed)
    }

    @Test(arguments: ["lost", "failed"])
    func closingEndsWhatIsBroken(_ phase: String) {
        var state = state(phase)
        #expect(state.close(isIdle: true) == .nothing && state.phase == .ended)
    }

    @Test func theGoodbyeIsSaidOnce() {
        var state = state("closing")
        state.gone()
        #expect(state.phase == .ended)
        #expect(state.close(isIdle: true) == .nothing && state.phase == .ended)
        var open = self.state("open")
        open.gone()
        #expect(open.phase == .open)
    }

    @Test(arguments: phases)
    func abortingEndsAll(_ phase: String) {
        var state = state(phase)
        #expect(state.abort() == .cancel && state.phase == .ended)
        #expect(state.connected() == .nothing && state.refused(other, at: start) == .nothing)
    }

    @Test(arguments: phases)
    func silence(_ phase: String) {
        var state = state(phase, reconnectTime: 5)
        let isHeard = ["open", "draining"].contains(phase)
        #expect(state.timedOut(other) == (isHeard ? .fail(other) : .nothing))
    }
}
