import Testing

@testable import ImageConvert

@Suite struct PaceTests {
    @Test func piecesPassOneAfterTheOther() {
        var pace = Pace(bytesPerSecond: 1000)
        #expect(pace.turn(for: 500, at: .zero) == .zero)
        #expect(pace.turn(for: 1000, at: .zero) == .milliseconds(500))
        #expect(pace.turn(for: 1, at: .milliseconds(700)) == .milliseconds(1500))
    }

    /// A pause does not make the next pieces faster.
    @Test func timeIsNotMadeUpFor() {
        var pace = Pace(bytesPerSecond: 1000)
        _ = pace.turn(for: 1000, at: .zero)
        #expect(pace.turn(for: 1000, at: .seconds(10)) == .seconds(10))
        #expect(pace.turn(for: 1000, at: .seconds(10)) == .seconds(11))
    }
}
