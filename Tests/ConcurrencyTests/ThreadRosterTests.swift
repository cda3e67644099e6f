import Testing

@testable import Concurrency

@Suite struct ThreadRosterTests {
    /// The threads and jobs of an `IOExecutor` as numbers, without threads.
    private struct Model: Hashable {
        /// Threads that compute for a job, and threads in a system call of a job.
        var computing = 0
        var calling = 0
        /// Threads that have been called, and threads that sleep.
        var coming = 0
        var asleep = 0
        var jobs = 0
    }

    private enum Event: CaseIterable {
        case newJob, arrival, jobDone, systemCall, systemCallDone, failure
    }

    private struct State {
        var roster: ThreadRoster
        var model = Model()

        mutating func call() {
            switch roster.call(for: model.jobs) {
            case .nobody: break
            case .idleThread:
                model.asleep -= 1
                model.coming += 1
            case .newThread: model.coming += 1
            }
        }

        /// A thread that has a core takes a job or goes to sleep.
        mutating func goOn() {
            if model.jobs > 0, roster.mayGoOn {
                model.jobs -= 1
                model.computing += 1
                call()
            } else {
                roster.rest()
                model.asleep += 1
            }
        }

        /// - Returns: false if the event cannot happen now.
        mutating func take(_ event: Event) -> Bool {
            switch event {
            case .newJob:
                model.jobs += 1
                call()
            case .arrival:
                guard model.coming > 0 else { return false }
                model.coming -= 1
                roster.arrive()
                goOn()
            case .jobDone:
                guard model.computing > 0 else { return false }
                model.computing -= 1
                goOn()
            case .systemCall:
                guard model.computing > 0 else { return false }
                model.computing -= 1
                model.calling += 1
                roster.leaveCore()
                call()
            case .systemCallDone:
                guard model.calling > 0 else { return false }
                model.calling -= 1
                model.computing += 1
                roster.comeBack()
            case .failure:
                // `start` has made sure of the first thread, which therefore cannot fail.
                guard model.coming > 0, roster.threads > 1,
                    roster.threads > model.computing + model.calling + model.asleep
                else { return false }
                model.coming -= 1
                roster.fail()
                if roster.idle > 0 { call() }
            }
            return true
        }
    }

    /// Every order of up to twelve events on two cores, with up to four threads and three waiting
    /// jobs.
    @Test func everyOrderOfEvents() {
        let cores = 2
        let limit = 4
        var states = [State(roster: ThreadRoster(cores: cores, limit: limit))]
        var seen: Set<Model> = []
        for _ in 0..<12 {
            var next: [State] = []
            for state in states {
                for event in Event.allCases {
                    var new = state
                    guard new.take(event), new.model.jobs <= 3 else { continue }
                    let model = new.model
                    let roster = new.roster
                    #expect(roster.coming == model.coming && roster.idle == model.asleep)
                    #expect(roster.busy == model.computing + model.coming)
                    #expect(roster.threads <= limit)
                    // Only threads that come back from system calls can exceed the number of cores.
                    if event != .systemCallDone {
                        #expect(roster.busy <= max(cores, state.roster.busy))
                    }
                    // A waiting job has a thread, which comes for it or looks for it when done.
                    #expect(model.jobs == 0 || roster.busy + model.calling > 0, "\(model)")
                    if seen.insert(model).inserted { next.append(new) }
                }
            }
            states = next
        }
        #expect(seen.contains { $0.calling == 2 && $0.computing == 2 })
    }

    @Test func aFreeCoreAndAJobCallAThread() {
        var roster = ThreadRoster(cores: 2, limit: 8)
        #expect(roster.call(for: 0) == .nobody)
        #expect(roster.call(for: 1) == .newThread)
        // The called thread will take the job.
        #expect(roster.call(for: 1) == .nobody)
        #expect(roster.call(for: 2) == .newThread)
        #expect(roster.call(for: 3) == .nobody, "both cores are taken")
        roster.arrive()
        roster.leaveCore()
        #expect(roster.call(for: 2) == .newThread, "one sleeps in a system call")
        roster.arrive()
        roster.rest()
        #expect(roster.call(for: 2) == .idleThread)
    }

    @Test func aThreadThatIsDoneGivesWayToThoseThatCameBack() {
        var roster = ThreadRoster(cores: 1, limit: 8)
        #expect(roster.call(for: 1) == .newThread)
        roster.arrive()
        roster.leaveCore()
        #expect(roster.call(for: 1) == .newThread)
        roster.arrive()
        #expect(roster.mayGoOn)
        roster.comeBack()
        #expect(!roster.mayGoOn)
        roster.rest()
        #expect(roster.mayGoOn)
    }
}
